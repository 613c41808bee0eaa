"""Mixup and CutMix (arXiv 1710.09412, 1905.04899), for cross-entropy only: OAT has no targets for two labels.

Partners are fixed pairs of positions of the global batch, (0, 1), (2, 3), ...: the order is random already, and a pair
always lies on one rank and in one micro-batch (`Layout.unit` is even), so the result does not depend on how the batch
is dealt. Share and box are drawn once for a global batch from (seed, epoch, step), with our own hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oat_dist.batch import Mix
from oat_dist.data.hashing import keyed_hash
from oat_dist.data.images.draws import MIXING

__all__ = ["MAX_ALPHA", "MIN_ALPHA", "MIXES", "Mixing", "blend"]

MIXES = ("none", "mixup", "cutmix")
# Beta(a, a) is drawn by rejection; above this, too few draws are accepted, and below, all are 0 or 1.
MIN_ALPHA, MAX_ALPHA = 1e-3, 4.0
_DRAWS = 4096


@dataclass(frozen=True)
class Mixing:
    """How the images of a global batch are mixed.

    Args:
        kind: "mixup" or "cutmix".
        alpha: of Beta(alpha, alpha), from which a batch's share is drawn.
        seed: of the run.
    """

    kind: str
    alpha: float
    seed: int

    def of(self, epoch: int, step: int, size: int, valid_B: np.ndarray) -> Mix:
        """The mix of one micro-batch.

        Args:
            step: of the epoch: which global batch.
            size: pixels a side.
            valid_B: which samples count; a pair with one that does not stays as it is, as does a last odd sample.
        """
        uniform = keyed_hash(np.arange(2 * _DRAWS + 2), self.seed, epoch, step, MIXING) / 2.0**64
        share = _beta(uniform[2:], self.alpha)
        box = None
        if self.kind == "cutmix":
            top, bottom, left, right = _cut(share, uniform[0], uniform[1], size)
            box = (top, bottom, left, right)
            share = 1.0 - (bottom - top) * (right - left) / size**2
        slots_B = np.arange(len(valid_B))
        partner_B = slots_B ^ 1
        alone_B = partner_B >= len(valid_B)
        partner_B[alone_B] = slots_B[alone_B]
        alone_B |= ~valid_B | ~valid_B[partner_B]
        partner_B[alone_B] = slots_B[alone_B]
        return Mix(torch.from_numpy(partner_B), share, box)


def _beta(uniform: np.ndarray, alpha: float) -> float:
    """One draw of Beta(alpha, alpha) from uniform numbers: Jöhnk's algorithm, in logarithms for a small alpha."""
    with np.errstate(divide="ignore"):
        x, y = np.log(uniform.reshape(2, -1)) / alpha
    total = np.logaddexp(x, y)
    accepted = np.flatnonzero((total <= 0) & np.isfinite(total))
    return float(np.exp(x[accepted[0]] - total[accepted[0]])) if len(accepted) else 0.5


def _cut(share: float, row: float, column: float, size: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box of about (1 - share) of the image around a random middle, cut at the edges."""
    half = 0.5 * (1.0 - share) ** 0.5 * size
    middle = (int(row * size), int(column * size))
    edges = [min(max(int(m + sign * half), 0), size) for m in middle for sign in (-1, 1)]
    return edges[0], edges[1], edges[2], edges[3]


def blend(images_BCHW: Tensor, mix: Mix) -> Tensor:
    """Each image with its partner's: by weight (mixup), or with the box cut out of the partner (cutmix)."""
    partner_B = mix.partner_B.to(images_BCHW.device, non_blocking=True)
    if mix.box is None:
        return torch.lerp(images_BCHW[partner_B], images_BCHW, mix.share)
    top, bottom, left, right = mix.box
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[partner_B, :, top:bottom, left:right]
    return mixed_BCHW
