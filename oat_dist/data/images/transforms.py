"""Mirroring by hash, and from uint8 batches to normalised input on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from oat_dist.data.hashing import keyed_hash
from oat_dist.data.images.draws import FLIP
from oat_dist.data.images.resize import squash

__all__ = ["AUGMENTATIONS", "Normalise", "flips", "squash"]

AUGMENTATIONS = ("flip", "pad_crop", "randaugment", "trivialaugment")  # in their order of use


def flips(ids_B: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Which samples are mirrored this epoch (B,), bool: a function of (seed, epoch, id), not of rank or thread."""
    return (keyed_hash(ids_B, seed, epoch, FLIP) >> np.uint64(63)).astype(bool)


class Normalise:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) on the device: ``(x / 255 - mean) / std``.

    Moving bytes instead of floats to the device costs a quarter of the bandwidth.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        std_3 = torch.tensor(std, dtype=torch.float64)
        self.scale_311 = (1 / (255 * std_3)).float().view(3, 1, 1).to(device)
        self.shift_311 = (-torch.tensor(mean, dtype=torch.float64) / std_3).float().view(3, 1, 1).to(device)

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        images_BHWC = images_BHWC.to(self.device, non_blocking=True)
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images_BCHW.mul_(self.scale_311).add_(self.shift_311)
