"""Measures against other ways to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oat_dist.measures import accuracy_intervals, calibration_error, confusion_cells, mcnemar_exact, paired_test


def test_intervals_are_those_of_resampling_samples_one_by_one() -> None:
    rng = np.random.default_rng(7)
    labels_N = rng.choice(4, size=300, p=[0.6, 0.2, 0.15, 0.05])
    right_N = rng.random(300) < np.array([0.9, 0.5, 0.7, 0.2])[labels_N]
    accuracy, balanced = [], []
    for _ in range(4000):
        drawn = rng.integers(300, size=300)
        labels, right = labels_N[drawn], right_N[drawn]
        accuracy.append(right.mean())
        balanced.append(np.mean([right[labels == k].mean() for k in range(4) if (labels == k).any()]))
    totals, rights = np.bincount(labels_N, minlength=4), np.bincount(labels_N[right_N], minlength=4)
    found = accuracy_intervals(totals, rights)
    for interval, plain in zip(found, (accuracy, balanced), strict=True):
        assert interval == pytest.approx(np.percentile(plain, [2.5, 97.5]).tolist(), abs=0.012)
    assert found[0] != pytest.approx(found[1], abs=0.05)
    assert accuracy_intervals(totals, rights) == found  # the same answers, the same interval


def test_intervals_at_the_ends() -> None:
    assert accuracy_intervals(np.array([5, 0]), np.array([5, 0])) == ([1.0, 1.0], [1.0, 1.0])
    assert accuracy_intervals(np.array([5, 3]), np.array([0, 0])) == ([0.0, 0.0], [0.0, 0.0])
    many = np.full(1000, 50)
    low, high = accuracy_intervals(many, many // 2)[0]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(50_000), rel=0.1)


def test_confusion_cells() -> None:
    labels, predicted = np.array([2, 0, 2, 1, 2]), np.array([2, 1, 0, 1, 2])
    assert confusion_cells(labels, predicted, 3) == [[0, 1, 1], [1, 1, 1], [2, 0, 1], [2, 2, 2]]


def test_calibration_error() -> None:
    confidence_N, right_N = np.array([0.95, 0.95, 0.55, 1.0]), np.array([True, False, True, True])
    # the bin of 0.95 and 1.0: 2 of 3 right at a mean confidence of 0.9667; the bin of 0.55: 1 of 1
    expected = (abs(2 - 2.9) + abs(1 - 0.55)) / 4
    assert calibration_error(confidence_N, right_N) == pytest.approx(expected)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (10, 3), (5, 5), (0, 30), (200, 263)])
def test_mcnemar_is_the_sign_test(first: int, second: int) -> None:
    trials, fewer = first + second, min(first, second)
    exact = 2 * sum(math.comb(trials, k) for k in range(fewer + 1)) / 2**trials
    assert mcnemar_exact(first, second) == pytest.approx(min(1.0, exact), rel=1e-9)
    assert mcnemar_exact(first, second) == mcnemar_exact(second, first)


def test_mcnemar_of_many_samples() -> None:
    assert mcnemar_exact(25_000, 25_000) == 1.0
    assert 0 < mcnemar_exact(24_000, 26_000) < 1e-15


def test_paired_test() -> None:
    first, second = np.zeros(1000, dtype=bool), np.zeros(1000, dtype=bool)
    first[:600], second[80:640] = True, True
    found = paired_test(first, second)
    assert (found.samples, found.only_first, found.only_second) == (1000, 80, 40)
    assert found.difference == pytest.approx(0.04)
    assert found.p_value == mcnemar_exact(80, 40)
    low, high = found.interval
    spread = math.sqrt((0.12 - 0.04**2) / 1000)  # of the mean of +1, -1, 0
    assert (low, high) == pytest.approx((0.04 - 1.96 * spread, 0.04 + 1.96 * spread), abs=0.004)
    same = paired_test(first, first)
    assert (same.difference, same.interval, same.p_value) == (0.0, [0.0, 0.0], 1.0)
