"""What the loader hands to the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Mix", "Window"]


@dataclass(frozen=True)
class Mix:
    """How the samples of a micro-batch are mixed in pairs (mixup, cutmix).

    Attributes:
        partner_B: int64, the slot each sample is mixed with; its own for one that stays as it is.
        share: of a sample's own image and label, 0..1; the rest is its partner's.
        box: (top, bottom, left, right) in pixels, filled from the partner; None: the whole images are averaged.
    """

    partner_B: Tensor
    share: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images_BHWC: uint8 RGB; normalised on the device.
        labels_B: int64 class indices.
        ids_B: int64 sample ids (rows of the index).
        valid_B: bool, which samples count; None when all do. A masked sample (an undecodable image, or the
            stand-in of a rank that has none left) is outside anchor, loss and N.
        empty: whether the rank has no sample in this micro-batch and runs one masked stand-in, in step with the
            others.
        mix: None for samples as they are.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    ids_B: Tensor
    valid_B: Tensor | None = None
    empty: bool = False
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.labels_B)

    def every_valid(self) -> Tensor:
        """`valid_B`, also when all samples count."""
        return torch.ones(len(self), dtype=torch.bool) if self.valid_B is None else self.valid_B

    @property
    def num_valid(self) -> int:
        return len(self) if self.valid_B is None else int(self.valid_B.sum())


@dataclass(frozen=True)
class Window:
    """The micro-batches that one optimizer step of one rank takes.

    Attributes:
        num_samples: samples of the whole window over all ranks, as planned (masked ones included).
        num_valid: those of this rank that count.
        fingerprint: this rank's share of the order's fingerprint, modulo 2^64 (`oat_dist.data.plan`).
        epoch, step_in_epoch: where the window stands; both start at 0.
    """

    batches: tuple[Batch, ...]
    num_samples: int
    num_valid: int
    fingerprint: int
    epoch: int
    step_in_epoch: int
