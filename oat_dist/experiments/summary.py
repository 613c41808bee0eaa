"""From results to rows: means over seeds with their intervals, beside the paper's numbers and the baseline's.

All accuracies here are percentages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oat_dist.errors import ConfigError
from oat_dist.experiments.judge import Judged, Result, read_result
from oat_dist.experiments.plan import Plan
from oat_dist.experiments.statistics import Mean, mean_of, paired
from oat_dist.experiments.tables import Arm
from oat_dist.report.metrics import PROTOCOLS

__all__ = ["Results", "Row", "Score", "Times", "collect", "rows_of", "shown", "times_of"]

Results = Mapping[tuple[str, str, int], Result]


@dataclass(frozen=True)
class Score:
    """Of one protocol: both measures over the seeds, and the first one minus the baseline's, seed by seed.

    `against` is the protocol of the baseline, empty where there is nothing to compare with.
    """

    values: dict[int, float]
    mean: Mean | None
    accuracy: Mean | None
    balanced: Mean | None
    against: str
    difference: Mean | None


@dataclass(frozen=True)
class Row:
    """A cell, an arm and a checkpoint ("final" or "best").

    Attributes:
        protocol: the arm's own; the first of `scores`.
        missing, diverged: seeds.
        paper: its percentage, None where it is not known.
    """

    cell: str
    arm: str
    checkpoint: str
    protocol: str
    scores: dict[str, Score]
    missing: list[int]
    diverged: list[int]
    paper: float | None

    @property
    def score(self) -> Score | None:
        """The arm's own; None where there is no mean: a run is missing altogether, or one has diverged."""
        return self.scores.get(self.protocol)

    @property
    def to_paper(self) -> float | None:
        """Ours minus the paper's, points."""
        if self.score is None or self.score.mean is None or self.paper is None:
            return None
        return self.score.mean.mean - self.paper


@dataclass(frozen=True)
class Times:
    """Of an arm in a cell, means over seeds in seconds, beside those of the paper (None: not known)."""

    cell: str
    arm: str
    epoch: float | None
    evaluation: float | None
    paper_epoch: float | None
    paper_test: float | None


def collect(plan: Plan) -> dict[tuple[str, str, int], Result]:
    """Every result that there is, of any cell, arm and seed of the plan."""
    found = {}
    for where, run in plan.runs.items():
        result = read_result(run, plan.table)
        if result is not None:
            found[where] = result
    return found


def shown(plan: Plan, results: Results, cells: Sequence[str], arms: Sequence[str] | None) -> list[tuple[str, str]]:
    """The arms of cells that were asked for, and those that have results."""
    table, with_results = plan.table, {(cell, arm) for cell, arm, _ in results}
    asked = {(cell, arm) for cell in cells for arm in (table.arms_of(cell) if arms is None else arms)}
    # The same run may answer for several arms: of those that nobody asked for, only what the file compares.
    usual = {(cell, arm) for cell in table.cells for arm in table.arms_of(cell)} | {
        (cell, arm) for cell, arm in with_results if table.arms[arm].control
    }
    pairs = [(cell, arm) for cell in table.cells for arm in table.arms]
    return [pair for pair in pairs if pair in asked or pair in usual & with_results]


def rows_of(plan: Plan, results: Results, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """A row for each cell, arm and checkpoint.

    Raises:
        ConfigError: an arm is to be judged by a protocol that its networks do not have.
    """
    checkpoints = ("final",) if plan.table.select is None else ("final", "best")
    return [_row(plan, results, *pair, checkpoint) for pair in pairs for checkpoint in checkpoints]


def _row(plan: Plan, results: Results, cell: str, arm: str, checkpoint: str) -> Row:
    table = plan.table
    of_seed = {seed: results[cell, arm, seed] for seed in plan.seeds if (cell, arm, seed) in results}
    diverged = [seed for seed, result in of_seed.items() if result.diverged is not None]
    missing = [seed for seed in plan.seeds if seed not in of_seed]
    judged = {seed: result.checkpoints[checkpoint] for seed, result in of_seed.items() if result.diverged is None}
    protocol = _own_protocol(table.arms[arm], [(judged[seed], of_seed[seed].protocol) for seed in judged], arm)
    scores = {}
    if judged and not diverged:  # a mean of those that went well would say too much
        of_base = {seed: one for seed in judged if (one := results.get((cell, table.baseline, seed))) is not None}
        if any(one.diverged is not None for one in of_base.values()):
            of_base = {}  # the same holds of what it is compared with
        base = {seed: (one, one.checkpoints[checkpoint]) for seed, one in of_base.items()}
        base_own = _own_protocol(
            table.arms[table.baseline], [(one, result.protocol) for result, one in base.values()], table.baseline
        )
        base_judged = {seed: one for seed, (_, one) in base.items()}
        names = set.intersection(*(set(one.protocols) for one in judged.values()))
        for name in [protocol, *sorted(names - {protocol}, key=_place)]:
            against = name if all(name in one.protocols for one in base_judged.values()) else base_own
            if name == protocol:  # each under its own
                against = base_own
            scores[name] = _score(judged, name, base_judged if arm != table.baseline else {}, against, table.measure)
    return Row(cell, arm, checkpoint, protocol, scores, missing, diverged, (table.cells[cell].paper or {}).get(arm))


def _score(
    judged: Mapping[int, Judged], protocol: str, base: Mapping[int, Judged], against: str, measure: str
) -> Score:
    values = {seed: 100 * one.protocols[protocol][measure] for seed, one in judged.items()}
    theirs = {seed: 100 * one.protocols[against][measure] for seed, one in base.items()}
    both = {kind: mean_of([100 * one.protocols[protocol][kind] for one in judged.values()]) for kind in _KINDS}
    return Score(
        values,
        mean_of(list(values.values())),
        both["accuracy"],
        both["balanced"],
        against if theirs else "",
        paired(values, theirs),
    )


_KINDS = ("accuracy", "balanced")


def _own_protocol(arm: Arm, judged: Sequence[tuple[Judged, str]], name: str) -> str:
    """The protocol an arm is judged by; empty where nothing is judged yet."""
    if not judged:
        return arm.protocol or ""
    protocols, configured = judged[0][0].protocols, judged[0][1]
    own = arm.protocol or ("argmax" if "argmax" in protocols else configured)
    if own not in protocols:
        raise ConfigError(f"arm {name}: its networks have no protocol {own}; they have {', '.join(protocols)}")
    return own


def _place(protocol: str) -> tuple[int, str]:
    return (PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS), protocol)


def times_of(plan: Plan, results: Results, pairs: Sequence[tuple[str, str]]) -> list[Times]:
    """The times of every arm that has any."""
    found = []
    for cell, arm in pairs:
        mine = [results[cell, arm, seed] for seed in plan.seeds if (cell, arm, seed) in results]
        epoch = mean_of([one.epoch_seconds for one in mine if one.epoch_seconds is not None])
        test = mean_of([one.test_seconds for one in mine if one.test_seconds is not None])
        if epoch is not None or test is not None:
            of_paper = plan.table.cells[cell]
            found.append(
                Times(
                    cell,
                    arm,
                    None if epoch is None else epoch.mean,
                    None if test is None else test.mean,
                    of_paper.paper_epoch_seconds.get(arm),
                    of_paper.paper_test_seconds.get(arm),
                )
            )
    return found
