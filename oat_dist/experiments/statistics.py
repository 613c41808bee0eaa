"""What several seeds say: means with their 95 % t-intervals, and differences seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

__all__ = ["Mean", "mean_of", "paired", "verdict"]


_NOTHING = 1e-9  # percentages that are equal differ by so little once they have been subtracted


@dataclass(frozen=True)
class Mean:
    """Of `count` numbers, with the 95 % interval of Student's t; None for one number, or where all are equal: there
    is no spread to make one of."""

    count: int
    mean: float
    interval: tuple[float, float] | None


def mean_of(values: Sequence[float]) -> Mean | None:
    """Mean over seeds; None where there is no number."""
    if not values:
        return None
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if spread < _NOTHING:
        return Mean(len(values), mean, None)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return Mean(len(values), mean, (mean - half, mean + half))


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Mean | None:
    """Mean of the differences `ours` - `base` over the seeds that both have, with its paired t-interval."""
    return mean_of([ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())])


def verdict(difference: Mean | None) -> str:
    """What a difference shows, and no more."""
    if difference is None:
        return ""
    if difference.interval is None:
        return "one seed: no interval" if difference.count == 1 else "the same in every seed: no interval"
    low, high = difference.interval
    if low > 0:
        return "shown better"
    if high < 0:
        return "shown worse"
    return "not shown"
