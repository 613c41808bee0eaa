"""Runs that differ in nothing but their seed, together: mean and spread over seeds."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oat_dist.report.data import Run, flatten, lookup

__all__ = ["Group", "Spread", "differing", "find_groups", "spread"]

# Of another start, place or log of the same run.
_NO_MATTER = ("seed", "output_dir", "start_from", "resume", "dry_run")
_NO_MATTER_SECTIONS = ("job.", "log.")

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond, the normal one is within 2 %.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


def _result(run: Run) -> tuple[Any, ...] | None:
    """What the results of two runs must share to go into one mean; None where a run has none."""
    if not run.metrics.finished or run.score is None:
        return None
    return run.protocol, *run.evaluated_on, str(run.environment.get("train_digest"))


def _reason(run: Run) -> str:
    if not run.metrics.finished:
        return "not finished"
    return "no accuracy" if run.score is None else "another protocol or other data"


@dataclass(frozen=True)
class Group:
    """One or several runs of one configuration; `seeds` has the seed of each run, None where it is not known."""

    name: str
    runs: list[Run]
    seeds: list[Any]

    @property
    def counted(self) -> list[tuple[Any, Run]]:
        """Seed and run of those that a mean takes in: finished, of one protocol, on the same data."""
        done = [(seed, run) for seed, run in zip(self.seeds, self.runs, strict=True) if _result(run) is not None]
        usual = Counter(_result(run) for _, run in done).most_common(1)  # of equals the first
        return [(seed, run) for seed, run in done if _result(run) == usual[0][0]]

    @property
    def left_out(self) -> dict[str, str]:
        """Why a mean leaves out which runs, by name."""
        taken = {id(run) for _, run in self.counted}
        rest = [run for run in self.runs if id(run) not in taken]
        return {run.name: _reason(run) for run in rest}

    @property
    def by_seed(self) -> dict[Any, Run]:
        """The first counted run of each seed: the same seed again adds nothing to a spread."""
        found: dict[Any, Run] = {}
        for seed, run in self.counted:
            found.setdefault(seed, run)
        return found

    @property
    def first(self) -> Run:
        """The run that stands for the group."""
        return next(iter(self.by_seed.values()), self.runs[0])

    @property
    def apart(self) -> list[Run]:
        """The runs left out that do not stand for the group."""
        return [run for run in self.runs if run.name in self.left_out and run is not self.first]


@dataclass(frozen=True)
class Spread:
    """Mean of `count` numbers, standard deviation, and the 95 % t-interval of the mean (None with one number)."""

    count: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of some numbers, at least one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(1, mean, None, None)
    std = statistics.stdev(values)
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
    half = quantile * std / math.sqrt(len(values))
    return Spread(len(values), mean, std, (mean - half, mean + half))


def find_groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration without its seed, in the order in which they come; a run without a configuration alone."""
    found: dict[str, list[Run]] = {}
    for position, run in enumerate(runs):
        rest = {key: value for key, value in flatten(run.config).items() if key and not _no_matter(key)}
        found.setdefault(
            repr(sorted(rest.items(), key=lambda item: item[0])) if rest else f"run {position}", []
        ).append(run)
    return [Group(_name(members), members, [_seed(run) for run in members]) for members in found.values()]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration keys in which runs differ, with the value of each run ("-" where it has none)."""
    flats = [flatten(run.config) if run.config else {} for run in runs]
    keys = [key for key in dict.fromkeys(key for flat in flats for key in flat) if key and key != "output_dir"]
    rows = {key: [flat.get(key, "-") for flat in flats] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


def _seed(run: Run) -> Any:
    seed = lookup(run.config, "seed")
    return seed if seed is None or isinstance(seed, int) else repr(seed)


def _no_matter(key: str) -> bool:
    return key in _NO_MATTER or key.startswith(_NO_MATTER_SECTIONS)


def _name(runs: Sequence[Run]) -> str:
    """What the names of the runs have in common, without what is left of a seed."""
    if len(runs) == 1:
        return runs[0].name
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False))
    common = "".join(letters[0] for letters in same)
    common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common)
    return common or f"{runs[0].name} and {len(runs) - 1} more"


def common_seeds(group: Group, base: Group) -> Mapping[Any, tuple[Run, Run]]:
    """Pairs of runs of the same seed, by seed."""
    mine, theirs = group.by_seed, base.by_seed
    return {seed: (mine[seed], theirs[seed]) for seed in mine if seed is not None and seed in theirs}
