"""A part of a decoded image to (S, S, 3).

How, by r = pixels of the part over S, on each axis (measured, 224 pixels: microseconds on one core):

1. r >= 2 on both axes: the image is first reduced by 2, 4 or 8, the most that leaves r >= 1. JPEGs are decoded at that
   scale, which is faster than in full; decoded images are averaged over 2 x 2 pixels as often as needed (70).
2. r > 1.3: smoothed (100 to 200), so that the whole is as wide as the triangle that antialiased bilinear resizing
   applies: that has variance r^2 / 6, linear interpolation 1/6. Nearer to Pillow than cv2.INTER_AREA, in a third of its
   time.
3. Linear (110), which alone would alias above r = 1.3.

Boxes off the grid of the reduced image, and evaluation, are resized by Pillow, exactly (500 to 4,500).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from oat_dist.data.images.opencv import cv2

__all__ = ["REDUCTIONS", "put", "reduction", "resize_crop", "resize_reduced", "squash"]

# libjpeg-turbo's fast scales, 1/8, 1/4, 1/2; those between are slower than decoding in full.
REDUCTIONS = (8, 4, 2)
_LINEAR_UP_TO = 1.3
_THREE_TAPS_UP_TO = 2.1


def squash(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Resize to (size, size, 3) whatever the aspect ratio, bilinear and antialiased, as the authors do."""
    if image_HWC.shape[:2] == (size, size):
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR))


def resize_crop(image_HWC: np.ndarray, box: Sequence[int], size: int, out_SSC: np.ndarray | None = None) -> np.ndarray:
    """Cut `box` = (top, left, height, width) out of a decoded image, to (size, size, 3) uint8.

    Args:
        out_SSC: where the result is put; None: a new array.
    """
    top, left, height, width = box
    crop_HWC = image_HWC[top : top + height, left : left + width]
    factor = reduction(height, width, size)
    if height % factor or width % factor:
        return put(squash(crop_HWC, size), out_SSC)
    while factor > 1:
        shape = (crop_HWC.shape[1] // 2, crop_HWC.shape[0] // 2)
        crop_HWC = cv2.resize(crop_HWC, shape, interpolation=cv2.INTER_AREA)
        factor //= 2
    return _smooth_linear(crop_HWC, size, out_SSC)


def resize_reduced(
    image_HWC: np.ndarray, box: Sequence[int], factor: int, size: int, out_SSC: np.ndarray | None = None
) -> np.ndarray:
    """`resize_crop` from an image that was reduced by `factor` already; `box` is still in pixels of the full one."""
    top, left, height, width = box
    if any(edge % factor for edge in box):
        edges = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
        image = Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR, box=edges)
        return put(np.asarray(image), out_SSC)
    top, left, height, width = (edge // factor for edge in box)
    return _smooth_linear(image_HWC[top : top + height, left : left + width], size, out_SSC)


def reduction(height: int, width: int, size: int) -> int:
    """By how much an image may be reduced first, so that a part of it still covers (size, size)."""
    return next((factor for factor in REDUCTIONS if min(height, width) >= factor * size), 1)


def _smooth_linear(crop_HWC: np.ndarray, size: int, out_SSC: np.ndarray | None) -> np.ndarray:
    down, across = crop_HWC.shape[0] / size, crop_HWC.shape[1] / size
    if max(down, across) > _LINEAR_UP_TO:
        crop_HWC = cv2.sepFilter2D(crop_HWC, -1, _smoothing(across), _smoothing(down), borderType=cv2.BORDER_REFLECT)
    return put(cv2.resize(crop_HWC, (size, size), dst=out_SSC, interpolation=cv2.INTER_LINEAR), out_SSC)


def _smoothing(ratio: float) -> np.ndarray:
    """The kernel that linear interpolation needs before it at this ratio."""
    variance = max((ratio**2 - 1) / 6, 0.0)
    if ratio <= _THREE_TAPS_UP_TO:
        return np.array([variance / 2, 1 - variance, variance / 2])
    sigma = math.sqrt(variance)
    return cv2.getGaussianKernel(2 * math.ceil(1.5 * sigma) + 1, sigma)


def put(image_SSC: np.ndarray, out_SSC: np.ndarray | None) -> np.ndarray:
    """The image, or the array it was put into."""
    if out_SSC is None or image_SSC is out_SSC:
        return image_SSC
    out_SSC[:] = image_SSC
    return out_SSC
