"""Is it an image that training can decode, of which kind and size? Decoded whole: only that finds one cut short."""

from __future__ import annotations

import io
import threading
from typing import NamedTuple

from PIL import Image

from oat_dist.data.images.decode import FORMATS, ImageError, decode_rgb
from oat_dist.errors import DataError

__all__ = ["ImageInfo", "check_image", "image_kind"]

_JPEG = b"\xff\xd8"
# Pillow's name of a format -> the extension under which WebDataset readers decode it
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # opened by the JPEG reader
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}


# Small images are mostly all of one size: each is decoded over the last one, which saves a seventh of the time.
_SMALL_BYTES = 1 << 14
_last = threading.local()


class ImageInfo(NamedTuple):
    """Kind (the extension that fits the content), width and height in stored pixels (EXIF not applied)."""

    extension: str
    width: int
    height: int


def check_image(data: bytes) -> ImageInfo:
    """Decode `data` exactly as training will, and say what it is.

    Raises:
        DataError: with the bare reason, the same for the same bytes (it goes into manifests).
    """
    last_HWC = getattr(_last, "pixels_HWC", None)
    try:
        pixels_HWC = decode_rgb(data, last_HWC)
    except ImageError as error:
        raise DataError(str(error)) from error
    if pixels_HWC is not last_HWC and pixels_HWC.nbytes <= _SMALL_BYTES and data.startswith(_JPEG):
        _last.pixels_HWC = pixels_HWC
    height, width, _ = pixels_HWC.shape
    return ImageInfo(image_kind(data), width, height)


def image_kind(data: bytes) -> str:
    """The extension that fits the content of an image that can be decoded."""
    if data.startswith(_JPEG):
        return "jpg"
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _EXTENSIONS[image.format or ""]
