"""Augmentation of whole batches, in place, on uint8 (B, H, W, 3)."""

from __future__ import annotations

import numpy as np

from oat_dist.data.images.draws import PAD_CROP, uniforms
from oat_dist.data.images.opencv import cv2

__all__ = ["flip_images", "pad_crop_images", "pad_crop_offsets"]

_CACHED = 1 << 18  # bytes worked on together: many small images in one call, and copies stay in the cache
_MANY = 32  # images of up to 52 x 52


def flip_images(images_BHWC: np.ndarray, flipped_B: np.ndarray) -> None:
    """Mirror left and right those images that `flipped_B` (bool) names."""
    slots = np.flatnonzero(flipped_B)
    together = _together(images_BHWC)
    if together == 1:
        for slot in slots.tolist():
            image_HWC = images_BHWC[slot]
            cv2.flip(image_HWC, 1, dst=image_HWC)
        return
    for start in range(0, len(slots), together):
        some = slots[start : start + together]
        part_BHWC = images_BHWC[some]
        rows_RWC = part_BHWC.reshape(-1, *part_BHWC.shape[2:])  # for OpenCV one tall image
        images_BHWC[some] = cv2.flip(rows_RWC, 1).reshape(part_BHWC.shape)


def pad_crop_offsets(ids_B: np.ndarray, seed: int, epoch: int, padding: int) -> np.ndarray:
    """Where the crop of each padded image begins: (B, 2) int64, down and across, in 0 .. 2 * padding."""
    return (uniforms(ids_B, seed, epoch, PAD_CROP, 2) * (2 * padding + 1)).astype(np.int64)


def pad_crop_images(images_BHWC: np.ndarray, offsets_B2: np.ndarray, padding: int) -> None:
    """Put a black frame of `padding` pixels around each image and cut the old size out of it at the offsets."""
    number, height, width, channels = images_BHWC.shape
    together = min(_together(images_BHWC), number)
    padded_BHWC = np.zeros((together, height + 2 * padding, width + 2 * padding, channels), dtype=np.uint8)
    # Every crop there is, [image, down, across], as views of (H, W * C): rows are copied whole.
    ways, (image, row, column, _) = 2 * padding + 1, padded_BHWC.strides
    shape, strides = (together, ways, ways, height, width * channels), (image, row, column, row, 1)
    crops_BYXHL = np.ndarray(shape, np.uint8, padded_BHWC, strides=strides)
    for start in range(0, number, together):
        part_BHWC = images_BHWC[start : start + together]
        padded_BHWC[: len(part_BHWC), padding : padding + height, padding : padding + width] = part_BHWC
        offsets_P2 = offsets_B2[start : start + together]
        if together >= _MANY:  # one call, which costs less than a Python loop, and one more copy
            crops_PHL = crops_BYXHL[np.arange(len(part_BHWC)), offsets_P2[:, 0], offsets_P2[:, 1]]
            part_BHWC[:] = crops_PHL.reshape(part_BHWC.shape)
        else:
            for slot, (down, across) in enumerate(offsets_P2.tolist()):
                part_BHWC[slot] = padded_BHWC[slot, down : down + height, across : across + width]


def _together(images_BHWC: np.ndarray) -> int:
    return max(_CACHED // max(images_BHWC[:1].nbytes, 1), 1)
