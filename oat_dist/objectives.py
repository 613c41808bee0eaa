"""What is minimised and how its outputs become class scores: cross-entropy and OAT behind one interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from oat_dist.anchor import anchor_of, center_map, invert, segment_sum
from oat_dist.distributed import group_size
from oat_dist.oat_loss import OATLoss

__all__ = ["CLASS_WEIGHTS", "OAT", "CrossEntropy", "Objective", "oat_scores"]

CLASS_WEIGHTS = ("none", "balanced")


class Objective(Protocol):
    """A training objective.

    Attributes:
        name: of the phase, in logs.
        couples_samples: whether the gradient of a sample depends on the others of its batch.
    """

    name: str
    couples_samples: bool

    def loss(self, logits_BC: Tensor, labels_B: Tensor, num_samples: int | Tensor, valid_B: Tensor | None) -> Tensor:
        """This rank's part of the mean loss over `num_samples` samples, times W; its backward is exact."""
        ...

    def anchors(self) -> Tensor | None:
        """The anchors (G, C) of the last `loss`; None for an objective without anchors."""
        ...


class CrossEntropy:
    """Softmax cross-entropy in fp32: the pre-training phase, and the baseline.

    Args:
        label_smoothing: share of a label that all classes get equally.
        offset_C: added to the logits (C,): ``tau * log share`` is logit adjustment (Menon et al., arXiv 2007.07314).
        weight_C: weight of each class (C,). The sum of weighted losses is divided by the number of samples, not by the
            sum of their weights as torch does within a batch: a sample counts the same wherever it is dealt.
    """

    name = "cross_entropy"
    couples_samples = False

    def __init__(
        self, label_smoothing: float = 0.0, offset_C: Tensor | None = None, weight_C: Tensor | None = None
    ) -> None:
        self.label_smoothing = label_smoothing
        self.offset_C, self.weight_C = offset_C, weight_C

    def loss(self, logits_BC: Tensor, labels_B: Tensor, num_samples: int | Tensor, valid_B: Tensor | None) -> Tensor:
        if logits_BC.dtype != torch.float64:
            logits_BC = logits_BC.float()
        if valid_B is not None:
            logits_BC = logits_BC.masked_fill(~valid_B[:, None], 0)
            labels_B = labels_B.masked_fill(~valid_B, -100)  # ignore_index of cross_entropy
        with torch.autocast(logits_BC.device.type, enabled=False):
            if self.offset_C is not None:
                logits_BC = logits_BC + self.offset_C.to(logits_BC)
            weight_C = None if self.weight_C is None else self.weight_C.to(logits_BC)
            smoothing = self.label_smoothing
            total = cross_entropy(logits_BC, labels_B.long(), weight_C, reduction="sum", label_smoothing=smoothing)
        return total * (group_size() / num_samples)

    def anchors(self) -> Tensor | None:
        return None


class OAT:
    """Online Anchor-based Training; `criterion` holds its settings."""

    name = "oat"
    couples_samples = True

    def __init__(self, criterion: OATLoss) -> None:
        self.criterion = criterion

    def loss(self, logits_BC: Tensor, labels_B: Tensor, num_samples: int | Tensor, valid_B: Tensor | None) -> Tensor:
        # A global anchor's one collective carries the true count already when this is the whole update;
        # passing N keeps accumulation windows exact and costs nothing.
        return self.criterion(logits_BC, labels_B, num_samples, valid_B)

    def anchors(self) -> Tensor | None:
        anchor = self.criterion.anchor
        return anchor if anchor is None or anchor.ndim == 2 else anchor[None]


def oat_scores(logits_NC: Tensor, center: str, floor: float, group: int | None = None) -> Tensor:
    """Scores (N, C) under anchors of the tested samples themselves (paper Eq. 4).

    Args:
        logits_NC: outputs, float64 for exact repetition.
        group: every `group` consecutive rows are one test batch (1: each sample is its own); None: all rows are.
    """
    size = max(len(logits_NC), 1)
    size = size if group is None else min(group, size)
    count_G1 = segment_sum(torch.ones_like(logits_NC[:, :1]), size)
    center_GC = segment_sum(center_map(logits_NC, center), size) / count_G1
    anchor_GC = anchor_of(center_GC, center, floor)
    return invert(logits_NC, anchor_GC.repeat_interleave(size, dim=0)[: len(logits_NC)])
