"""Which part of an image is taken: boxes (top, left, height, width) in pixels of the stored image."""

from __future__ import annotations

import math

import numpy as np

from oat_dist.data.images.draws import RANDOM_RESIZED_CROP, uniforms
from oat_dist.data.images.resize import REDUCTIONS
from oat_dist.errors import DataError

__all__ = ["aligned_boxes", "center_boxes", "random_resized_boxes"]

_TRIES = 10


def random_resized_boxes(
    ids_B: np.ndarray,
    widths_B: np.ndarray,
    heights_B: np.ndarray,
    seed: int,
    epoch: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of torchvision's RandomResizedCrop, drawn by hash: (B, 4) int64.

    Args:
        ids_B: sample ids; with seed and epoch they decide everything.
        widths_B, heights_B: of the stored images.
        scale: share of the image's area, from and to.
        ratio: width over height, from and to; uniform in its logarithm.

    Raises:
        DataError: an image of no pixels.
    """
    widths_B, heights_B = _sizes(widths_B, heights_B)
    draws_BT4 = uniforms(ids_B, seed, epoch, RANDOM_RESIZED_CROP, 4 * _TRIES).reshape(-1, _TRIES, 4)
    area_BT = (widths_B * heights_B)[:, None] * (scale[0] + draws_BT4[:, :, 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BT = np.exp(low + draws_BT4[:, :, 1] * (high - low))
    across_BT = np.rint(np.sqrt(area_BT * ratio_BT)).astype(np.int64)
    down_BT = np.rint(np.sqrt(area_BT / ratio_BT)).astype(np.int64)
    fits_BT = (across_BT > 0) & (across_BT <= widths_B[:, None]) & (down_BT > 0) & (down_BT <= heights_B[:, None])
    rows_B, first_B = np.arange(len(widths_B)), fits_BT.argmax(axis=1)
    across_B, down_B = across_BT[rows_B, first_B], down_BT[rows_B, first_B]
    draws_B4 = draws_BT4[rows_B, first_B]
    top_B = (draws_B4[:, 2] * (heights_B - down_B + 1)).astype(np.int64)
    left_B = (draws_B4[:, 3] * (widths_B - across_B + 1)).astype(np.int64)
    boxes_B4 = np.stack([top_B, left_B, down_B, across_B], axis=1)
    none_B = ~fits_BT.any(axis=1)
    if none_B.any():
        boxes_B4[none_B] = _largest_central(widths_B[none_B], heights_B[none_B], ratio)
    return boxes_B4


def _largest_central(widths_B: np.ndarray, heights_B: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest box in the middle whose shape lies within `ratio`: where no try has fitted."""
    down_B = np.where(widths_B / heights_B < ratio[0], np.rint(widths_B / ratio[0]), heights_B).astype(np.int64)
    across_B = np.where(widths_B / heights_B > ratio[1], np.rint(heights_B * ratio[1]), widths_B).astype(np.int64)
    down_B, across_B = np.maximum(down_B, 1), np.maximum(across_B, 1)
    return np.stack([(heights_B - down_B) // 2, (widths_B - across_B) // 2, down_B, across_B], axis=1)


def center_boxes(widths_B: np.ndarray, heights_B: np.ndarray, fraction: float) -> np.ndarray:
    """The middle square of `fraction` of the short side, (B, 4) int64: resized to S, it is
    ``Resize(S / fraction)`` and ``CenterCrop(S)``.

    Raises:
        DataError: an image of no pixels.
    """
    widths_B, heights_B = _sizes(widths_B, heights_B)
    side_B = np.maximum(np.rint(np.minimum(widths_B, heights_B) * fraction), 1).astype(np.int64)
    return np.stack([(heights_B - side_B) // 2, (widths_B - side_B) // 2, side_B, side_B], axis=1)


def aligned_boxes(boxes_B4: np.ndarray, size: int) -> np.ndarray:
    """Boxes whose edges lie on whole pixels of the reduced image they are cut from (see `resize.reduction`).

    They shrink by less than one reduced pixel, so never by more than 1/size, and need no interpolation of their own:
    such boxes take the fast way.
    """
    shorter_B = boxes_B4[:, 2:].min(axis=1)
    factor_B = 1 + sum((shorter_B >= factor * size) * (factor // 2) for factor in REDUCTIONS)
    return boxes_B4 // factor_B[:, None] * factor_B[:, None]


def _sizes(widths_B: np.ndarray, heights_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As int64: unsigned columns of an index would wrap around."""
    widths_B, heights_B = np.asarray(widths_B, dtype=np.int64), np.asarray(heights_B, dtype=np.int64)
    empty_B = (widths_B < 1) | (heights_B < 1)
    if empty_B.any():
        slot = int(empty_B.argmax())
        raise DataError(
            f"the index gives an image of {widths_B[slot]} x {heights_B[slot]} pixels, and a crop needs its true size; "
            "make the index again, or use data.crop=squash"
        )
    return widths_B, heights_B
