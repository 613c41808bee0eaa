"""Shrinks and re-encodes images while they are packed.

The pixels are those that training would decode (`decode_rgb`: EXIF orientation not applied, alpha dropped, 8 bits);
grey images stay grey. Metadata is not carried over.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from oat_dist.data.images.decode import FORMATS, ImageError, decode_rgb
from oat_dist.data.images.imagecheck import ImageInfo, check_image, image_kind
from oat_dist.errors import DataError

__all__ = ["Recode"]

_QUALITY = 95
# Extension -> Pillow's name. A GIF holds 256 colours, which a shrunk image exceeds: it becomes a PNG.
_OWN_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "gif": "PNG"}
_WITH_QUALITY = ("JPEG", "WEBP")
_GREY_MODES = ("1", "L", "LA", "I")


@dataclass(frozen=True)
class Recode:
    """What is done to images: the short side they are shrunk to, the format and quality they are written in.

    Without `format` only images that shrink are written anew, in their own format.
    """

    short_side: int | None = None
    format: str | None = None
    quality: int = _QUALITY

    @classmethod
    def parse(cls, short_side: int | None, reencode: str | None) -> Recode | None:
        """From the options; None: the bytes are kept.

        Raises:
            DataError: a side below 1; a format other than jpeg, png, webp; a quality not in 1 to 100.
        """
        if short_side is not None and short_side < 1:
            raise DataError(f"short_side is {short_side}; it must be at least 1 pixel")
        if reencode is None:
            return cls(short_side) if short_side is not None else None
        match = re.fullmatch(r"(jpeg|png|webp)(?::([0-9]{1,3}))?", reencode)
        if not match:
            raise DataError(f"reencode is {reencode!r}; write jpeg, jpeg:QUALITY, png, webp or webp:QUALITY")
        quality = int(match[2] or _QUALITY)
        if match[2] and (match[1] == "png" or not 1 <= quality <= 100):
            why = "PNG is lossless and has no quality" if match[1] == "png" else "quality goes from 1 to 100"
            raise DataError(f"reencode is {reencode!r}; {why}")
        return cls(short_side, match[1].upper(), quality)

    def describe(self) -> str:
        """For the manifest: `short side at most 256 (Lanczos, JPEG and WebP quality 95)`."""
        if self.format is None:
            return f"short side at most {self.short_side} (Lanczos, JPEG and WebP quality {self.quality})"
        written = f"{self.format.lower()}:{self.quality}" if self.format in _WITH_QUALITY else self.format.lower()
        return (
            f"short side at most {self.short_side} (Lanczos), " if self.short_side else ""
        ) + f"written as {written}"

    def apply(self, data: bytes) -> tuple[bytes, ImageInfo]:
        """The image file to store instead of `data`, and what it is.

        Raises:
            DataError: `data` cannot be decoded, or has too many pixels for the format.
        """
        try:
            pixels_HWC = decode_rgb(data)
        except ImageError as error:
            raise DataError(str(error)) from error
        kind = image_kind(data)
        height, width, _ = pixels_HWC.shape
        shrinks = self.short_side is not None and min(height, width) > self.short_side
        if self.format is None and not shrinks:
            return data, ImageInfo(kind, width, height)
        image = _to_image(data, pixels_HWC)
        if shrinks:
            image = image.resize(_shrunk(width, height, self.short_side or 1), Image.Resampling.LANCZOS)
        encoded = _encode(image, self.format or _OWN_FORMAT[kind], self.quality)
        return encoded, check_image(encoded)


def _shrunk(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height, the shorter one `short_side`, the longer one rounded to the nearest, half up."""
    short, long = sorted((width, height))
    other = (2 * long * short_side + short) // (2 * short)
    return (short_side, other) if width <= height else (other, short_side)


def _to_image(data: bytes, pixels_HWC: np.ndarray) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        grey = image.mode in _GREY_MODES or image.mode.startswith("I;16")
    return Image.fromarray(np.ascontiguousarray(pixels_HWC[:, :, 0]) if grey else pixels_HWC)


def _encode(image: Image.Image, form: str, quality: int) -> bytes:
    options: dict[str, Any] = {"quality": quality} if form in _WITH_QUALITY else {}
    if form == "JPEG":
        options["subsampling"] = 0  # 4:4:4: colour at full resolution, as a shrunk image has it
    file = io.BytesIO()
    try:
        image.save(file, form, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be written as {form}: {error}") from error
    return file.getvalue()
