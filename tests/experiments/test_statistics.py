"""Means and intervals over seeds, against formulas written out."""

from __future__ import annotations

import math
import statistics

import pytest

from oat_dist.experiments.statistics import Mean, mean_of, paired, verdict


def test_the_t_interval() -> None:
    values = [60.1, 60.9, 61.4, 60.2, 60.6]
    found = mean_of(values)
    half = 2.7764451051977987 * statistics.stdev(values) / math.sqrt(5)  # t of 4 degrees of freedom, 97.5 %
    assert found is not None and found.interval is not None
    assert found.mean == pytest.approx(60.64)
    assert found.interval == pytest.approx((60.64 - half, 60.64 + half))


def test_pairs_are_by_seed_and_narrower_than_apart() -> None:
    ours, base = {0: 61.0, 1: 65.0, 2: 69.0, 7: 1.0}, {2: 68.0, 1: 64.1, 0: 60.1, 9: 0.0}
    found = paired(ours, base)
    assert found is not None and found.interval is not None
    assert (found.count, found.mean) == (3, pytest.approx((0.9 + 0.9 + 1.0) / 3))
    half = 4.302652729749464 * statistics.stdev([0.9, 0.9, 1.0]) / math.sqrt(3)
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))
    assert verdict(found) == "shown better"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_verdict_says_no_more_than_the_interval() -> None:
    assert verdict(Mean(5, -0.5, (-0.9, -0.1))) == "shown worse"
    assert verdict(Mean(5, 0.5, (-0.1, 1.1))) == "not shown"
    assert verdict(Mean(5, 0.5, (0.0, 1.0))) == "not shown"
    assert verdict(mean_of([0.5])) == "one seed: no interval"
    assert verdict(mean_of([0.5, 0.5])) == "the same in every seed: no interval"
    assert verdict(mean_of([])) == ""
    same = paired({0: 60.1, 1: 70.3, 2: 60.7}, {0: 60.0, 1: 70.2, 2: 60.6})  # 0.1 each time, but for rounding
    assert verdict(same) == "the same in every seed: no interval"
