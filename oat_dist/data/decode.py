"""Image files to uint8 RGB arrays."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

__all__ = ["ImageError", "decode_rgb"]


class ImageError(Exception):
    """Bytes that are not an image we can decode. The caller knows the sample's name and decides what to do."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode fully to (H, W, 3) uint8 RGB; grey, palette and CMYK images are converted, alpha is dropped.

    Raises:
        ImageError: not an image, truncated, or so large that it looks like a decompression bomb.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:
            pass  # odd colour spaces and markers: Pillow reads some, and judges the others
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # A palette image with transparency loses it here; that is what we want, not news.
            warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as e:
        raise ImageError(str(e) or type(e).__name__) from e
