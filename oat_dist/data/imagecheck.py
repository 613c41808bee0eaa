"""Is it an image that training can decode, of which kind and size? Decoded whole: only that finds one cut short."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from oat_dist.data.decode import FORMATS, ImageError, decode_rgb
from oat_dist.errors import DataError

__all__ = ["ImageInfo", "check_image"]

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
    try:
        height, width, _ = decode_rgb(data).shape
    except ImageError as error:
        raise DataError(str(error)) from error
    if data.startswith(b"\xff\xd8"):
        return ImageInfo("jpg", width, height)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return ImageInfo(_EXTENSIONS[image.format or ""], width, height)
