"""The mathematics of Online Anchor-based Training (OAT) on plain tensors: no processes, no modules, no state.

Source: Tzelepi & Mezaris, ICIP 2024, arXiv 2406.12662, Eqs. 1 to 4. Shapes: B samples, C classes, G anchor sets.

    center   c = mean of f(z_i) over the anchor set      f = identity or softmax (CENTERS)
    anchor   a = softmax(c), or c itself for "prior"     then the floor: (1 - C*eps) * a + eps
    target   t_i = onehot_i / a - 1                      percentage change of the label from the anchor
    loss     L = 1/(N C) * sum (z_ik - t_ik)^2
    inverse  s = a * (z + 1)                             class = argmax

Two controls have a fixed anchor, which nothing is averaged for: "uniform" (1/C) and "one_hot" (1, so that s = z + 1 is
trained by plain MSE towards the one-hot label). They show what the square loss does without an anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CENTERS",
    "FIXED",
    "Statistics",
    "anchor_gradient",
    "anchor_of",
    "anchor_targets",
    "batch_anchor",
    "center_gradient",
    "center_map",
    "default_floor",
    "global_loss",
    "invert",
    "segment_sum",
]

CENTERS = ("probabilities", "logits", "prior", "uniform", "one_hot")
FIXED = ("uniform", "one_hot")  # controls: no center, and so no gradient through it, no floor


def default_floor(center: str, num_classes: int, floor: float | None) -> float:
    """The anchor floor eps: the given one, else 0, but 0.2/C for "prior" (whose anchor may reach zero).

    Raises:
        ValueError: unknown center, a floor outside 0 <= eps < 1/C, or one for a fixed anchor.
    """
    if center not in CENTERS:
        raise ValueError(f"center must be one of {', '.join(CENTERS)}, not {center!r}")
    eps = (0.2 / num_classes if center == "prior" else 0.0) if floor is None else float(floor)
    if not 0 <= eps * num_classes < 1:
        raise ValueError(f"anchor floor must lie in 0 <= floor < 1/C = {1 / num_classes:.4g}, not {eps}")
    if eps and center in FIXED:
        raise ValueError(f"the anchor of center {center} is fixed and has no floor")
    return eps


def center_map(logits_BC: Tensor, center: str) -> Tensor:
    """f of the center, row by row: the identity for "logits" (paper Eq. 1), zero for `FIXED` ones, else softmax."""
    if center in FIXED:
        return torch.zeros_like(logits_BC)
    return logits_BC if center == "logits" else logits_BC.softmax(dim=-1)


def anchor_of(center_C: Tensor, center: str, floor: float) -> Tensor:
    """The anchor of a center, (..., C) to (..., C): softmax ("prior": none), then the floor."""
    if center == "one_hot":
        return torch.ones_like(center_C)
    anchor_C = center_C if center == "prior" else center_C.softmax(dim=-1)
    return anchor_C if floor == 0 else anchor_C * (1 - floor * center_C.shape[-1]) + floor


def batch_anchor(logits_BC: Tensor, center: str = "probabilities", floor: float | None = None) -> Tensor:
    """The anchor (C,) of one anchor set: softmax of the mean of f(z) over it (paper Eq. 1). Differentiable.

    Args:
        logits_BC: raw network outputs of the anchor set, B >= 1.
        center: "probabilities" (the authors' code: f = softmax), "logits" (the paper: f = identity), "prior", or one
            of the controls `FIXED`.
        floor: eps of the anchor floor; None means 0, but 0.2/C for "prior".
    """
    if logits_BC.ndim != 2 or logits_BC.shape[0] == 0:
        raise ValueError(f"logits must have shape (B, C) with B >= 1, not {tuple(logits_BC.shape)}")
    eps = default_floor(center, logits_BC.shape[1], floor)
    return anchor_of(center_map(logits_BC, center).mean(dim=0), center, eps)


def anchor_targets(labels_B: Tensor, anchor_C: Tensor) -> Tensor:
    """Targets (B, C): the percentage change of the one-hot label from the anchor (paper Eq. 2).

    `anchor_C` is one anchor (C,), or one per sample (B, C).
    """
    onehot_BC = torch.nn.functional.one_hot(labels_B.long(), anchor_C.shape[-1]).to(anchor_C.dtype)
    return onehot_BC / anchor_C - 1


def invert(logits_BC: Tensor, anchor_C: Tensor) -> Tensor:
    """Scores (B, C) in the space of the labels, ``a * (z + 1)`` (paper Eq. 4); the class is their argmax."""
    return anchor_C * (logits_BC + 1)


def segment_sum(values_BX: Tensor, size: int) -> Tensor:
    """Sums over runs of `size` consecutive rows, (G, X) with G = ceil(B / size); the last run may be short."""
    whole = values_BX.shape[0] // size
    head_GX = values_BX[: whole * size].reshape(whole, size, *values_BX.shape[1:]).sum(dim=1)
    if whole * size == values_BX.shape[0]:
        return head_GX
    return torch.cat([head_GX, values_BX[whole * size :].sum(dim=0, keepdim=True)])


@dataclass
class Statistics:
    """The 3C + 2 numbers of each anchor set that give its anchor, its loss and the gradient of every sample.

    One tensor (G, 3C + 2), so that a global anchor costs one collective:
    ``[sum f(z) (C), S (C), n (C), sum (z+1)^2, count]`` with n_k the samples of class k and S_k the sum of
    z_ik + 1 over them.
    """

    packed_GX: Tensor

    @property
    def num_classes(self) -> int:
        return (self.packed_GX.shape[1] - 2) // 3

    @property
    def center_sum_GC(self) -> Tensor:
        return self.packed_GX[:, : self.num_classes]

    @property
    def label_sum_GC(self) -> Tensor:
        """S_k, the sum of z_ik + 1 over the samples of class k."""
        return self.packed_GX[:, self.num_classes : 2 * self.num_classes]

    @property
    def label_count_GC(self) -> Tensor:
        """n_k, the number of samples of class k."""
        return self.packed_GX[:, 2 * self.num_classes : 3 * self.num_classes]

    @property
    def square_sum_G(self) -> Tensor:
        return self.packed_GX[:, -2]

    @property
    def count_G(self) -> Tensor:
        return self.packed_GX[:, -1]

    def center_GC(self) -> Tensor:
        """The mean of f(z); zero for a set without samples."""
        return self.center_sum_GC / self.count_G.clamp(min=1)[:, None]


def anchor_gradient(statistics: Statistics, anchor_GC: Tensor, scale: Tensor | float) -> Tensor:
    """dL/da (G, C): ``scale * (S/a^2 - n/a^3)``, with scale = 2/(N C).

    A class that no sample of the set has contributes zero whatever its anchor, also where that has underflown.
    """
    count_GC = statistics.label_count_GC
    inverse_GC = anchor_GC.reciprocal()
    excess_GC = torch.addcmul(statistics.label_sum_GC, count_GC, inverse_GC, value=-1)
    return (excess_GC * inverse_GC.square_() * scale).masked_fill_(count_GC == 0, 0)


def center_gradient(dl_da_GC: Tensor, anchor_GC: Tensor, center: str, floor: float) -> Tensor:
    """dL/dc (G, C) from dL/da: through the floor and (but for "prior") through the softmax."""
    keep = 1 - floor * anchor_GC.shape[-1]
    if center == "prior":
        return keep * dl_da_GC
    softmax_GC = anchor_GC if floor == 0 else (anchor_GC - floor) / keep
    weighted_GC = softmax_GC * dl_da_GC
    gradient_GC = weighted_GC - softmax_GC * weighted_GC.sum(dim=-1, keepdim=True)
    return gradient_GC if floor == 0 else keep * gradient_GC


def global_loss(statistics: Statistics, anchor_GC: Tensor, num_samples: float | None = None) -> Tensor:
    """The loss L over all anchor sets (a scalar in float64), from the statistics alone.

    The expansion cancels where an anchor entry is tiny: it is for checks and logs, gradients never come from it.
    """
    packed = Statistics(statistics.packed_GX.double())
    anchor_GC = anchor_GC.double()
    count_GC = packed.label_count_GC
    per_class_GC = count_GC / anchor_GC**2 - 2 * packed.label_sum_GC / anchor_GC
    total = packed.square_sum_G.sum() + torch.where(count_GC > 0, per_class_GC, torch.zeros_like(per_class_GC)).sum()
    samples = packed.count_G.sum() if num_samples is None else num_samples
    return total / (samples * packed.num_classes)
