"""What an evaluation found: answers of every sample under every protocol, and the measures made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oat_dist.measures import accuracy_intervals, confusion_cells

__all__ = ["Evaluation", "ProtocolResult"]


@dataclass(frozen=True)
class ProtocolResult:
    """Answers under one protocol.

    Attributes:
        predicted_N: classes (N,) of the evaluated samples; `correct` of `total` are right.
        ties: ids of samples whose two best scores are too close to call.
        details: what takes more than a glance at the scores; None where it was not asked for.
    """

    predicted_N: Tensor
    correct: int
    total: int
    ties: list[int]
    details: Details | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Details:
    """
    Attributes:
        confidence_N: probability (N,) of the predicted class, float32.
        brier: mean over samples of the sum over classes of (probability - one-hot)^2, in 0..2.
        top5_correct: samples whose class is among the five best; None with five classes or fewer.
        seeds: protocol "batch": accuracy under each of several seeds of the groups, the first being the result's own.
    """

    confidence_N: Tensor
    brier: float
    top5_correct: int | None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Results by protocol, with the ids and labels (N,) they refer to; `undecodable` samples took no part."""

    ids_N: Tensor
    labels_N: Tensor
    protocols: dict[str, ProtocolResult] = field(default_factory=dict)
    undecodable: int = 0

    def __str__(self) -> str:
        return "  ".join(f"{name} {result.accuracy:.2%}" for name, result in self.protocols.items())

    def right_N(self, protocol: str) -> np.ndarray:
        """Which samples are right (N,), bool."""
        return (self.protocols[protocol].predicted_N == self.labels_N).numpy()

    def summary(self, classes: list[str]) -> dict[str, Any]:
        """What goes into evaluation.json: JSON values only."""
        total_C = torch.bincount(self.labels_N, minlength=len(classes)).numpy()
        protocols, per_class, confusion = {}, {}, {}
        for name, result in self.protocols.items():
            right_C = torch.bincount(self.labels_N[result.predicted_N == self.labels_N], minlength=len(classes)).numpy()
            share_C = [r / t if t else None for r, t in zip(right_C.tolist(), total_C.tolist(), strict=True)]
            interval, balanced = accuracy_intervals(total_C, right_C)
            protocols[name] = {
                "accuracy": result.accuracy,
                "interval": interval,
                "correct": result.correct,
                "total": result.total,
                "balanced_accuracy": statistics.fmean(share for share in share_C if share is not None),
                "balanced_interval": balanced,
                **_of_details(result.details, result.total),
                "ties": result.ties,
            }
            per_class[name] = share_C
            confusion[name] = confusion_cells(self.labels_N.numpy(), result.predicted_N.numpy(), len(classes))
        return {
            "class_names": classes,
            "total": len(self.labels_N),
            "undecodable": self.undecodable,
            "protocols": protocols,
            "per_class": per_class,
            "confusion": confusion,
        }

    def answers(self) -> dict[str, Tensor]:
        """What goes into evaluation.safetensors: ids, labels, and for each protocol the predicted classes."""
        tensors = {"ids": self.ids_N.long(), "labels": self.labels_N.int()}
        for name, result in self.protocols.items():
            tensors[f"predicted.{name}"] = result.predicted_N.int()
            if result.details is not None:
                tensors[f"confidence.{name}"] = result.details.confidence_N
        return tensors


def _of_details(details: Details | None, total: int) -> dict[str, Any]:
    if details is None:
        return {}
    found: dict[str, Any] = {
        "top5": None if details.top5_correct is None else details.top5_correct / total,
        "brier": details.brier,
    }
    if details.seeds:
        found["seeds"] = {
            "count": len(details.seeds),
            "mean": statistics.fmean(details.seeds),
            "std": statistics.stdev(details.seeds) if len(details.seeds) > 1 else 0.0,
            "min": min(details.seeds),
            "max": max(details.seeds),
            "accuracies": list(details.seeds),
        }
    return found
