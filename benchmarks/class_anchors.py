"""Anchors of the classes, the variant that the paper compares with for time alone (section 3.5). No part of oat_dist.

The anchor of class k is the softmax of the mean output of its training samples, computed beforehand and fixed. In
training a sample has the anchor of its own class. A test sample has none that may be known, so the nearest anchor is
searched: the text leaves open by which distance; here it is the Euclidean one between softmax(output) and the anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oat_dist.anchor import anchor_targets, invert
from oat_dist.errors import DataError

__all__ = ["ClassAnchors", "class_anchors", "nearest_anchor_scores"]


def class_anchors(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The anchors (C, C), row k that of class k, from the outputs of training samples.

    Raises:
        DataError: a class without a sample.
    """
    classes = logits_NC.shape[1]
    count_K = torch.bincount(labels_N, minlength=classes)
    if not bool(count_K.all()):
        raise DataError(f"class {int(count_K.argmin())} has no sample among {len(labels_N):,}; take more --images")
    sum_KC = logits_NC.new_zeros(classes, classes).index_add_(0, labels_N, logits_NC)
    return torch.softmax(sum_KC / count_K[:, None], dim=1)


class ClassAnchors:
    """The mean square of output minus `onehot / a_y - 1`, a_y the anchor of the sample's class: an `Objective`."""

    name = "class_anchors"
    couples_samples = False

    def __init__(self, anchors_KC: Tensor) -> None:
        self._targets_KC = anchor_targets(torch.arange(len(anchors_KC), device=anchors_KC.device), anchors_KC)

    def loss(self, logits_BC: Tensor, labels_B: Tensor, num_samples: int | Tensor, valid_B: Tensor | None) -> Tensor:
        assert valid_B is None
        return (logits_BC - self._targets_KC[labels_B]).square().sum() / (num_samples * logits_BC.shape[1])

    def anchors(self) -> Tensor | None:
        return None


def nearest_anchor_scores(logits_NC: Tensor, anchors_KC: Tensor) -> Tensor:
    """Scores (N, C): each output inverted with the anchor that is nearest to its softmax."""
    nearest_N = torch.cdist(torch.softmax(logits_NC, dim=1), anchors_KC).argmin(dim=1)
    return invert(logits_NC, anchors_KC[nearest_N])
