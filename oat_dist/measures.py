"""Measures of a classifier's answers, and how sure they are: plain numbers in, plain numbers out, no torch.

Intervals are 95 % percentile bootstrap over the samples of the split. Resampling samples changes only how many of each
(class, right or wrong) are drawn, so the resamples are drawn as multinomial counts of those cells: the same
distribution as drawing samples one by one, at a cost that does not grow with their number. They cover the choice of
test samples, not that of the seed of training. Under the protocols "batch" and "dataset" samples share anchors; the
resampling treats them as independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["PairedTest", "accuracy_intervals", "calibration_error", "confusion_cells", "mcnemar_exact", "paired_test"]

_RESAMPLES = 2000
_BOUNDS = (2.5, 97.5)  # percentiles


def accuracy_intervals(total_C: np.ndarray, right_C: np.ndarray, seed: int = 0) -> tuple[list[float], list[float]]:
    """95 % intervals [low, high] of accuracy and of balanced accuracy.

    Args:
        total_C: samples of each class; right_C: how many of them are predicted right.
        seed: of the resampling, so that the same answers have the same interval.
    """
    cells_K = np.concatenate([right_C, total_C - right_C]).astype(np.float64)
    samples = int(cells_K.sum())
    rng = np.random.default_rng(seed)
    accuracy, balanced = [], []
    for start in range(0, _RESAMPLES, 100):  # 1,000 classes: 100 x 2,000 counts at a time
        drawn_RK = rng.multinomial(samples, cells_K / samples, size=min(100, _RESAMPLES - start))
        right_RC, wrong_RC = np.split(drawn_RK, 2, axis=1)
        accuracy.append(right_RC.sum(axis=1) / samples)
        seen_RC = right_RC + wrong_RC
        share_RC = np.divide(right_RC, seen_RC, out=np.zeros(seen_RC.shape), where=seen_RC > 0)
        balanced.append(share_RC.sum(axis=1) / (seen_RC > 0).sum(axis=1))
    return _interval(np.concatenate(accuracy)), _interval(np.concatenate(balanced))


def confusion_cells(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> list[list[int]]:
    """The confusion matrix as its cells that are not zero: [true class, predicted class, samples], sorted."""
    pair_N = labels_N.astype(np.int64) * num_classes + predicted_N.astype(np.int64)
    pairs, counts = np.unique(pair_N, return_counts=True)
    return [[int(p) // num_classes, int(p) % num_classes, int(n)] for p, n in zip(pairs, counts, strict=True)]


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean over samples of |accuracy - confidence| of their bin, `bins` equally wide."""
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    gap_K = np.bincount(bin_N, weights=right_N - confidence_N.astype(np.float64), minlength=bins)
    return float(np.abs(gap_K).sum() / len(confidence_N))


@dataclass(frozen=True)
class PairedTest:
    """Two classifiers on the same samples.

    Attributes:
        only_first, only_second: samples that only this one has right.
        difference: accuracy of the first minus that of the second, with its 95 % interval (bootstrap over samples).
        p_value: of McNemar's exact test that neither is better.
    """

    samples: int
    only_first: int
    only_second: int
    difference: float
    interval: list[float]
    p_value: float


def paired_test(first_right_N: np.ndarray, second_right_N: np.ndarray, seed: int = 0) -> PairedTest:
    """Compare two classifiers by which samples (N,), bool, each has right; N >= 1."""
    samples = len(first_right_N)
    only_first = int((first_right_N & ~second_right_N).sum())
    only_second = int((second_right_N & ~first_right_N).sum())
    shares = np.array([only_first, only_second, samples - only_first - only_second]) / samples
    drawn_R3 = np.random.default_rng(seed).multinomial(samples, shares, size=_RESAMPLES)
    return PairedTest(
        samples,
        only_first,
        only_second,
        (only_first - only_second) / samples,
        _interval((drawn_R3[:, 0] - drawn_R3[:, 1]) / samples),
        mcnemar_exact(only_first, only_second),
    )


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the samples that one alone has right, half belong to each."""
    trials, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) - trials * math.log(2)
        for k in range(fewer + 1)
    ]
    largest = max(logs)
    return min(1.0, 2 * math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs))


def _interval(values_R: np.ndarray) -> list[float]:
    low, high = np.percentile(values_R, _BOUNDS)
    return [float(low), float(high)]
