"""From the numbers of reference and ranks to a verdict. Pure functions on what `reference` and `ranks` write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oat_dist.parallel_check.job import Case, Job

__all__ = ["BOUND", "CONTROL", "FARTHER", "Control", "Row", "bound_of", "conclude", "judge", "judge_controls"]

BOUND = 5e-5  # correct code: up to 9e-6 in fp32 without kinks and tiny steps; wrong code: 1.8e-3 and more
CONTROL = 1e-3
FARTHER = 20  # CONTROL / BOUND
_ROUNDING_MARGIN = 5
_ANCHOR_ROUNDING = 1e-7  # of an entry, in fp32

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One engine with one layout against the reference.

    Attributes:
        configured: whether it is the layout of the configuration.
        ids: whether the ranks saw the samples of the plan, each once and in order.
        anchors: largest difference of an anchor's entry; None without anchors.
        loss, gradient: largest relative difference of the loss and of the gradient's norm in a step.
        parameters: |theta_N - theta_1| / |theta_1 - theta_0| after the last step.
        collectives: the most of ours in a step.
        faults: what is wrong; empty when all is well.
    """

    engine: str
    layout: str
    configured: bool
    ids: bool
    anchors: float | None
    loss: float
    gradient: float
    parameters: float
    collectives: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Control:
    """A wrong way, which the measure must notice; `anchors` and `parameters` as in `Row`."""

    engine: str
    what: str
    anchors: float | None
    parameters: float
    noticed: bool


def bound_of(reference: Found) -> float:
    """`BOUND`, or more where rounding alone goes nearly as far: very small steps, functions with kinks."""
    return max(BOUND, _ROUNDING_MARGIN * float(reference["rounding"]))


def judge(job: Job, engine: str, reference: Found, ranks: Sequence[Found]) -> list[Row]:
    """One row a case."""
    same_start = all(rank["digest"] == reference["digest"] for rank in ranks)
    rows = []
    for number, case in enumerate(job.cases):
        row = _row(case, engine, reference, [rank["cases"][number] for rank in ranks])
        faults = row.faults if same_start else (*row.faults, "the ranks start from other weights than one process")
        rows.append(dataclasses.replace(row, configured=number == 0, faults=faults))
    return rows


def judge_controls(
    job: Job, engine: str, reference: Found, ranks: Sequence[Found], rows: Sequence[Row]
) -> list[Control]:
    """One a control; `engine` and `ranks` are where the controls were run, `rows` those of all engines.

    A wrong way must lead farther than `CONTROL`, and clearly farther than every row. A wrong anchor moves the
    parameters little where anchors are detached and the network is new: then it is noticed all the same if it lies
    clearly farther from the reference's anchor than every anchor of the rows.
    """
    needed = max(CONTROL, bound_of(reference), FARTHER * max(row.parameters for row in rows))
    anchors_needed = max([FARTHER * row.anchors for row in rows if row.anchors is not None], default=math.inf)
    controls = []
    for what in ranks[0]["controls"]:
        found = [rank["controls"][what] for rank in ranks]
        parameters = found[0]["parameters"]
        anchors = _anchors(job.cases[0], reference, found, complete=False)
        far = anchors is not None and anchors > max(anchors_needed, _ANCHOR_ROUNDING)
        controls.append(Control(engine, what, anchors, parameters, far or not parameters <= needed))
    return controls


def conclude(rows: Sequence[Row], controls: Sequence[Control], rounding: float) -> tuple[bool, str]:
    """Whether all is well, and what that means in a sentence."""
    failed = [row for row in rows if row.faults]
    if failed:
        row = failed[0]
        return False, (
            f"FAIL: {len(failed)} of {len(rows)} rows differ from one process; the first, {row.engine}, {row.layout}: "
            f"{row.faults[0]}"
        )
    unnoticed = [control.what for control in controls if not control.noticed]
    if unnoticed:
        remedy = "raise --steps, or lower batch_size"
        if rounding > BOUND:
            remedy = f"rounding alone goes as far as {rounding:.1e}, so try another optim.lr for this check"
        return False, (
            f"too weak: {' and '.join(unnoticed)} would have gone unnoticed, so the agreement above shows too little; "
            f"{remedy}"
        )
    return True, "all is well: the ranks train as one process does, and wrong ways would have been noticed"


def _row(case: Case, engine: str, reference: Found, found: Sequence[Found]) -> Row:
    run = reference["runs"][case.reference]
    steps = range(len(case.parts))
    ids = all(_ids_equal(case, step, reference, found) for step in steps)
    anchors = _anchors(case, reference, found)
    loss = _largest(
        _relative(sum(rank["loss"][step] for rank in found) / len(found), run["loss"][step]) for step in steps
    )
    gradient = _largest(_relative(rank["norm"][step], run["norm"][step]) for step in steps for rank in found)
    parameters = found[0]["parameters"]
    bound = bound_of(reference)
    faults = [] if ids else ["the sample ids are not those of the plan"]
    for what, value in (("parameters", parameters), ("gradient", gradient), ("loss", loss), ("anchors", anchors)):
        if value is not None and not value <= bound:
            off = f"off by {value:.1e}, the bound is {bound:.1e}" if math.isfinite(value) else "not finite"
            faults.append(f"{what} {off}")
    counts = [rank["collectives"] for rank in found]
    if any(count != case.collectives for count in counts):
        faults.append(f"collectives of the steps: {counts[0]} instead of {case.collectives}")
    most = max(max(count) for count in counts)
    return Row(engine, case.name, False, ids, anchors, loss, gradient, parameters, most, tuple(faults))


def _ids_equal(case: Case, step: int, reference: Found, found: Sequence[Found]) -> bool:
    """Every planned sample once, at its place; and the ranks' fingerprints add up to the whole's."""
    planned = reference["ids"][step]
    seen: list[int | None] = [None] * len(planned)
    if any(len(rank["ids"][step]) != len(case.parts[step]) for rank in found):
        return False
    for number, parts in enumerate(case.parts[step]):
        for (start, stop), rank in zip(parts, found, strict=True):
            ids = rank["ids"][step][number]
            if len(ids) != stop - start or any(place is not None for place in seen[start:stop]):
                return False
            seen[start:stop] = ids
    fingerprint = sum(rank["fingerprints"][step] for rank in found) % 2**64
    return seen == planned and fingerprint == reference["fingerprints"][step]


def _anchors(case: Case, reference: Found, found: Sequence[Found], *, complete: bool = True) -> float | None:
    """The largest difference of an anchor's entry in any step on any rank; infinite if anchors are lacking that must
    be `complete`."""
    run = reference["runs"][case.reference]
    steps = range(len(case.parts))
    differences = [value for step in steps for value in _differences(case, step, run, found, complete)]
    return _largest(differences) if differences else None


def _differences(case: Case, step: int, run: Found, found: Sequence[Found], complete: bool) -> Iterator[float]:
    for number, sets_of_ranks in enumerate(case.sets[step]):
        for sets, rank in zip(sets_of_ranks, found, strict=True):
            calls = rank["anchors"][step]
            anchors = calls[number] if number < len(calls) else []
            if len(anchors) < len(sets) and complete:
                yield math.inf
            for (start, stop), anchor in zip(sets, anchors, strict=False):
                expected = run["anchors"][step].get(f"{start}-{stop}")
                if expected is not None:  # else none of its samples could be decoded
                    yield from (abs(a - b) for a, b in zip(anchor, expected, strict=True))


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-30)


def _largest(values: Iterator[float] | Sequence[float]) -> float:
    """The maximum, or NaN when one of them is NaN."""
    known = list(values)
    return math.nan if any(math.isnan(value) for value in known) else max(known)
