"""Is it an image, of which kind and size? It is decoded whole: only that finds a file that was cut short."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

from oat_dist.errors import DataError

__all__ = ["ImageInfo", "check_image"]

# PIL's name of a format -> the extension under which WebDataset readers decode it
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
_FORMATS = [name for name in _EXTENSIONS if name != "MPO"]  # MPO is opened by PIL's JPEG reader


class ImageInfo(NamedTuple):
    """Kind (the extension that fits the content), width and height in stored pixels (EXIF not applied)."""

    extension: str
    width: int
    height: int


def check_image(data: bytes) -> ImageInfo:
    """Decode `data` fully and say what it is; of an animation, the first frame.

    Raises:
        DataError: with the bare reason, the same for the same bytes (it goes into manifests).
    """
    if not data:
        raise DataError("the file is empty")
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if width * height <= limit:
                simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True)
                return ImageInfo("jpg", width, height)
        except ValueError:
            pass  # damaged, or merely odd (CMYK, stray bytes between markers): PIL decides
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            image.load()
            return ImageInfo(_EXTENSIONS[image.format or ""], image.width, image.height)
    except UnidentifiedImageError:  # its text names a memory address
        raise DataError("not an image of a known kind") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than {limit:,} pixels, PIL's limit against decompression bombs") from None
    except Exception as error:  # PIL's readers raise whatever comes up: SyntaxError, struct.error, zlib.error, ...
        raise DataError(str(error).partition("\n")[0] or type(error).__name__) from error
