"""What the data path is to reach, and what a run has found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.data_measure import Timing, ratios, spread
from benchmarks.data_ours import CACHED, CEILING, OURS, READ
from benchmarks.data_peers import AT_RANDOM, IN_ORDER, RECIPE
from benchmarks.data_steps import IN_MEMORY, LOADED

__all__ = ["READING", "STEPS", "Goal", "goals", "show_goals"]

READING, STEPS = "reading", "steps"

# what, of which section, this side, beside that one, how many times as fast at least
_WANTED = (
    ("CIFAR-10 from JPEG shards, x recipe", "CIFAR-10", OURS, RECIPE, 38.0),
    ("CIFAR-10, decoded cache, x recipe", "CIFAR-10", CACHED, RECIPE, 126.0),
    ("one sample at random, x webdataset's", READING, READ, AT_RANDOM, 100.0),
    ("one sample at random, x its next one", READING, READ, IN_ORDER, 100.0),
    ("CIFAR-10 end to end, of in memory", STEPS, LOADED, IN_MEMORY, 0.95),
    ("photos S, x recipe", "photos S", OURS, RECIPE, 5.5),
    ("photos M, x recipe", "photos M", OURS, RECIPE, 5.5),
    ("photos L, x recipe", "photos L", OURS, RECIPE, 5.5),
    ("photos S, of decode only", "photos S", OURS, CEILING, 0.75),
    ("photos L, of decode only", "photos L", OURS, CEILING, 0.9),
)


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: float
    found: list[float]

    @property
    def reached(self) -> bool:
        return statistics.median(self.found) >= self.wanted


def goals(found: Mapping[str, Mapping[str, Timing]]) -> list[Goal]:
    """Those that the measured sections, by name, can answer."""
    return [
        Goal(what, wanted, ratios(found[section][beside].cpu, found[section][side].cpu))
        for what, section, side, beside, wanted in _WANTED
        if section in found
    ]


def show_goals(reached: list[Goal]) -> None:
    print(f"\n{'goal':<38}{'wanted':>8}   found")
    for goal in reached:
        verdict = "reached" if goal.reached else "missed"
        print(f"{goal.what:<38}{goal.wanted:>8g}   {spread(goal.found):<24}{verdict}")
