"""Whatever a user calls an image, as uint8 RGB (H, W, 3).

Arrays and tensors hold bytes, 0 to 255. Their shapes, told apart without guessing:

* (H, W), (H, W, 1): grey; (H, W, 3): RGB; (H, W, 4): RGBA, whose alpha is dropped. A NumPy array is always read so.
* a torch tensor may also have its channels first, (1, H, W), (3, H, W) or (4, H, W), as torchvision reads images; one
  that could be both, such as (3, 64, 3), is refused.

Numbers with a fraction are refused: nothing says whether they run to 1 or to 255, or whether they are normalised.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.errors import DataError

__all__ = ["LARGEST_FILE", "as_rgb", "is_single", "read_file"]

LARGEST_FILE = 256 << 20  # bytes of an image file; what is larger is no image that a memory should hold
_CHANNELS = (1, 3, 4)
_BYTES = (bytes, bytearray, memoryview)


def is_single(images: Any) -> bool:
    """Whether this is one image rather than a sequence of them."""
    return isinstance(images, (str, os.PathLike, Image.Image, *_BYTES)) or getattr(images, "ndim", 0) in (2, 3)


def as_rgb(image: Any) -> np.ndarray:
    """An image as uint8 (H, W, 3).

    Args:
        image: a path, the content of a file as bytes, a PIL image, or a uint8 array or tensor (see above).

    Raises:
        DataError: it cannot be read, decoded or understood.
    """
    if isinstance(image, (str, os.PathLike)):
        data = read_file(Path(image))
        try:
            return decode_rgb(data)
        except ImageError as error:
            raise DataError(f"{image}: not an image that can be decoded: {error}") from error
    if isinstance(image, _BYTES):
        try:
            return decode_rgb(bytes(image))
        except ImageError as error:
            raise DataError(f"bytes that cannot be decoded as an image: {error}") from error
    return _from_pillow(image) if isinstance(image, Image.Image) else _from_array(image)


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: it cannot be read, is something else (a pipe would block for ever), or is far too large.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > LARGEST_FILE:
            raise DataError(f"{path}: {status.st_size:,} bytes, more than an image file may have ({LARGEST_FILE:,})")
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):  # a folder: the system says so
            return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name that no file can have
        raise DataError(f"{str(path)!r}: cannot be read ({error})") from error
    raise DataError(f"{path}: cannot be read (not a regular file)")


def _from_pillow(image: Image.Image) -> np.ndarray:
    try:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            grey_HW = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow's own conversion would clip all at 255
            return np.repeat(grey_HW[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise DataError("a PIL image of 32 bits a pixel, with no defined range; convert it to 8 bits")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB, Pillow warns of the transparency that is lost
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes on first use
        if isinstance(error, DataError):
            raise
        raise DataError(f"a PIL image that cannot be decoded: {error}") from error


def _from_array(image: Any) -> np.ndarray:
    is_tensor = isinstance(image, Tensor)
    try:
        array = image.detach().cpu().numpy() if is_tensor else np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16; nested lists of unequal length
        raise DataError(f"not an image: {type(image).__name__} ({error})".replace("\n", " ")) from error
    wrong = f"an image array must be uint8 of shape (H, W, 3), not {array.dtype} {array.shape}"
    if array.dtype.kind == "f":
        wrong += "; floats have no known range: if they run from 0 to 1, give (255 * image).round() as uint8"
    if array.dtype != np.uint8:
        raise DataError(wrong)
    if array.size and array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.size and array.ndim == 3:
        last, first = array.shape[2] in _CHANNELS, is_tensor and array.shape[0] in _CHANNELS
        if first and last:
            raise DataError(
                f"a tensor of shape {array.shape} may have its channels first or last; give image.numpy() of shape "
                "(H, W, C): a NumPy array always has them last"
            )
        if first:
            array = array.transpose(1, 2, 0)
        if first or last:
            return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array[:, :, :3])
    if not is_tensor and array.ndim == 3 and array.shape[0] in _CHANNELS:
        wrong += "; its channels come first: give image.transpose(1, 2, 0)"
    raise DataError(wrong)
