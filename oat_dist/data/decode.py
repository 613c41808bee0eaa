"""Image files to uint8 RGB arrays. Called from many threads: nothing here touches `warnings` filters, which are
shared by all of them."""

from __future__ import annotations

import io
import math

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

__all__ = ["FORMATS", "ImageError", "decode_rgb"]

# Pillow's names of the formats we take. Pillow knows more; one of them (EPS) runs another program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


class ImageError(Exception):
    """Bytes that are not an image we can decode. The caller knows the sample's name and decides what to do."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode fully to (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, of 16 bits the upper 8 are kept, of an animation
    the first frame. EXIF orientation is not applied.

    Raises:
        ImageError: not an image, truncated, without a defined range of values (32-bit), or of more pixels than
            Pillow's limit against decompression bombs; with the bare reason, in one line.
    """
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= limit:
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # odd colour spaces and markers: Pillow reads some, and judges the others
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limit:  # where Pillow itself only warns
                raise Image.DecompressionBombError
            return _to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # its text names a memory address
        raise ImageError("not an image of a known kind" if data else "the file is empty") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {limit:,} pixels, Pillow's limit against decompression bombs") from None
    except Exception as error:  # Pillow's readers raise whatever comes up: SyntaxError, struct.error, zlib.error, ...
        raise ImageError(str(error).partition("\n")[0] or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of an opened image as (H, W, 3) uint8."""
    # Pillow holds 16-bit grey as "I;16..." or, from PNG and PPM, as "I"; its own conversion clips all at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError("32 bits a pixel, with no defined range; save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of the transparency that is lost
    return np.asarray(image.convert("RGB"))
