"""Image files to uint8 RGB arrays. Called from many threads: nothing here touches `warnings` filters, which are
shared by all of them.

The ladder: JPEG by libjpeg-turbo, for a crop at the smallest scale that still covers it; plain PNG by OpenCV; what
these do not read, and every judgement of what is damaged, by Pillow. EXIF orientation is not applied anywhere: boxes
and sizes are those of the stored pixels.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from oat_dist.data.images.opencv import cv2
from oat_dist.data.images.resize import reduction, resize_crop, resize_reduced

__all__ = ["FORMATS", "ImageError", "decode_crop", "decode_rgb", "jpeg_size", "refuse_outside"]

# Pillow's names of the formats we take. Pillow knows more; one of them (EPS) runs another program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN_HEADERS = (b"\x08\0\0\0\0", b"\x08\x02\0\0\0")  # 8 bits, grey or RGB, not interlaced
_LEAST_SIDE = 8  # from here on each of libjpeg-turbo's scales, n/8, gives a size of its own


class ImageError(Exception):
    """Bytes that are not an image we can decode. The caller knows the sample's name and decides what to do."""


def decode_rgb(data: bytes, out_HWC: np.ndarray | None = None) -> np.ndarray:
    """Decode fully to (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, of 16 bits the upper 8 are kept, of an animation
    the first frame. EXIF orientation is not applied.

    Args:
        out_HWC: a contiguous array that the caller has no other use for yet. A JPEG of exactly its shape is decoded
            into it, and it is what is returned; anything else comes back as a new array.

    Raises:
        ImageError: not an image, truncated, without a defined range of values (32-bit), or of more pixels than
            Pillow's limit against decompression bombs; with the bare reason, in one line.
    """
    image_HWC = None
    if data.startswith(_JPEG):
        image_HWC = _jpeg(data, out_HWC)
    elif data.startswith(_PNG):
        image_HWC = _plain_png(data)
    return _by_pillow(data) if image_HWC is None else image_HWC


def decode_crop(
    data: bytes, box: Sequence[int] | np.ndarray, size: int, out_SSC: np.ndarray | None = None
) -> np.ndarray:
    """Decode what is needed of `box` = (top, left, height, width), to (size, size, 3) uint8 RGB.

    A JPEG of which the box is larger than twice `size` is decoded at a lower scale. For training: evaluation decodes
    in full and resizes exactly.

    Args:
        out_SSC: where the result is put; None: a new array.

    Raises:
        ImageError: as `decode_rgb`, and if the box does not lie inside the image.
    """
    box = [int(edge) for edge in box]
    factor = reduction(box[2], box[3], size)
    if factor > 1 and data.startswith(_JPEG):
        image_HWC = _reduced_jpeg(data, box, factor)
        if image_HWC is not None:
            return resize_reduced(image_HWC, box, factor, size, out_SSC)
    image_HWC = decode_rgb(data)
    refuse_outside(box, *image_HWC.shape[:2])
    return resize_crop(image_HWC, box, size, out_SSC)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in stored pixels from a JPEG's header, at little cost; None: not one that can be read so."""
    if data.startswith(_JPEG):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return width, height
        except ValueError:
            pass
    return None


def _jpeg(data: bytes, out_HWC: np.ndarray | None) -> np.ndarray | None:
    """None: for Pillow to read or to judge, as are odd colour spaces and markers."""
    if out_HWC is not None:
        try:
            image_HWC = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out_HWC)
            return out_HWC if image_HWC.shape == out_HWC.shape else image_HWC.copy()
        except ValueError:
            pass  # larger, as a rule
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width <= _limit():
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        pass
    return None


def _reduced_jpeg(data: bytes, box: Sequence[int], factor: int) -> np.ndarray | None:
    """Scaled down by `factor` = 2, 4 or 8: pixel (y, x) covers the full image's [y, y + 1) * factor, and so on.

    None: as `_jpeg`.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > _limit() or min(height, width) < _LEAST_SIDE:
            return None
        refuse_outside(box, height, width)
        return simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=-(-height // factor), min_width=-(-width // factor)
        )
    except ValueError:
        return None


def _plain_png(data: bytes) -> np.ndarray | None:
    """A PNG of 8 bits, grey or RGB, with nothing in it but pixels, at a third of Pillow's time for small ones.

    OpenCV prints its complaints, so the file is walked first. None: for Pillow to read or to judge.
    """
    if data[24:29] not in _PLAIN_HEADERS:
        return None
    view, place, kind = memoryview(data), len(_PNG), b""
    while kind != b"IEND":
        end = place + 12 + int.from_bytes(data[place : place + 4])
        kind = data[place + 4 : place + 8]
        if end > len(data) or kind not in (b"IHDR", b"IDAT", b"IEND"):
            return None
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return None
        place = end
    if int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) > _limit():
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _by_pillow(data: bytes) -> np.ndarray:
    """Whatever `FORMATS` names, and the reason why something is not an image."""
    limit = _limit()
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


def _limit() -> float:
    return Image.MAX_IMAGE_PIXELS or math.inf


def refuse_outside(box: Sequence[int], height: int, width: int) -> None:
    """Raise `ImageError` unless `box` lies inside an image of this size: a slice would quietly be smaller."""
    top, left, down, across = box
    if min(top, left) < 0 or min(down, across) < 1 or top + down > height or left + across > width:
        raise ImageError(
            f"the image has {width} x {height} pixels, and the crop of {across} x {down} at ({left}, {top}) lies "
            "outside; the index gives another size: make it again"
        )
