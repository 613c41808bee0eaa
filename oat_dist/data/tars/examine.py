"""What an image is, to one of three depths: decoded and hashed, its header only, or not looked at."""

from __future__ import annotations

import hashlib
import io
import math

import simplejpeg
from PIL import Image

from oat_dist.data.images.decode import FORMATS, ImageError, decode_rgb

__all__ = ["decoded", "from_header", "unexamined"]


def decoded(data: bytes) -> tuple[int, int, bytes]:
    """(width, height, SHA-256 of the pixels as rows of RGB), decoded exactly as evaluation does.

    Raises:
        ImageError: it cannot be decoded.
    """
    image_HWC = decode_rgb(data)
    height, width, _ = image_HWC.shape
    return width, height, hashlib.sha256(image_HWC.data).digest()


def from_header(data: bytes) -> tuple[int, int, bytes]:
    """(width, height, b"") as the header says; the rest may be damaged.

    Raises:
        ImageError: no image of a kind we take, or one of too many pixels.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return width, height, b""
        except ValueError:
            pass  # as in decode_rgb, Pillow is the judge
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # Pillow's readers raise whatever comes up
        raise ImageError("not an image of a known kind" if data else "the file is empty") from None
    if width * height > limit:
        raise ImageError(f"more than {limit:,} pixels, Pillow's limit against decompression bombs")
    return width, height, b""


def unexamined(data: bytes) -> tuple[int, int, bytes]:
    """(0, 0, b"")."""
    return 0, 0, b""
