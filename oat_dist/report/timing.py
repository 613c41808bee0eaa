"""How long a run took and what it did meanwhile, out of its log."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oat_dist.report.data import Run, lookup
from oat_dist.report.html import Html, facts, section, table, tag
from oat_dist.report.metrics import Metrics, phase_name

__all__ = ["PhaseTime", "Timing", "cut_off_text", "duration", "read_timing", "timing_section"]


@dataclass(frozen=True)
class PhaseTime:
    """A phase: seconds of training (None: not known) and finished epochs, medians of what its lines say."""

    phase: str
    epochs: float | None
    seconds: float | None
    speed: float | None
    data_wait: float | None

    @property
    def epoch_seconds(self) -> float | None:
        return self.seconds / self.epochs if self.seconds is not None and self.epochs else None


@dataclass(frozen=True)
class Timing:
    """Seconds throughout.

    Attributes:
        wall: from each start to its stop, summed; None: not known. `cut_off` starts have no stop and are not in it.
        evaluation: all evaluations together, `evaluations` of them; None: not logged.
        estimated: the phases' seconds come from the logged throughput: a log without `seconds`.
        memory_gb: most that rank 0 held; None: not logged.
    """

    wall: float | None
    cut_off: int
    phases: list[PhaseTime]
    evaluation: float | None
    evaluations: int
    estimated: bool
    memory_gb: float | None

    def phase(self, name: str) -> PhaseTime | None:
        return next((phase for phase in self.phases if phase.phase == name), None)


def read_timing(run: Run) -> Timing:
    """Times of a run; steps that were trained again after a resume count once, but for `wall`."""
    metrics = run.metrics
    wall, cut_off = _wall(metrics)
    batch_size = lookup(run.config, "batch_size")
    per_epoch = _steps_per_epoch(run)
    phases, estimated = [], False
    order = list(dict.fromkeys(row.phase for row in metrics.training))
    before = 0
    rows_before = 0
    for phase in order:
        rows = [row for row in metrics.training if row.phase == phase]
        seconds: float | None = 0.0
        step = rows_before
        for row in rows:
            if "seconds" in row.values:
                spent: float | None = row.values["seconds"]
            elif type(batch_size) is int and row.values.get("samples_per_s", 0) > 0:
                spent, estimated = (row.step - step) * batch_size / row.values["samples_per_s"], True
            else:
                spent = None
            seconds = None if seconds is None or spent is None else seconds + spent
            step = row.step
        rows_before = step
        epochs = (step - before) / per_epoch if per_epoch else None
        before = step
        phases.append(PhaseTime(phase, epochs, seconds, _median(rows, "samples_per_s"), _median(rows, "data_wait")))
    by_step = {(row.step, row.split): row.seconds for row in metrics.validation if row.seconds is not None}
    memory = metrics.series("memory_gb")[1]
    return Timing(
        wall,
        cut_off,
        phases,
        sum(by_step.values()) if by_step else None,
        len(by_step),
        estimated,
        max(memory) if memory else None,
    )


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def timing_section(run: Run) -> Html:
    """Throughput and time, as a table of phases and a few totals."""
    title = "Throughput and time"
    if not run.metrics.training:
        return section(title, tag("p", "No training step has been logged yet."))
    timing = read_timing(run)
    rows = [
        [
            phase_name(phase.phase),
            "-" if phase.epochs is None else f"{phase.epochs:.3g}",
            duration(phase.seconds),
            duration(phase.epoch_seconds),
            "-" if phase.speed is None else f"{phase.speed:,.0f}",
            "-" if phase.data_wait is None else f"{100 * phase.data_wait:.1f}",
        ]
        for phase in timing.phases
    ]
    head = ["Phase", "Epochs#", "Training#", "An epoch#", "Samples/s, median#", "Waiting for data %, median#"]
    caption = "Training alone, without evaluations and saving."
    if timing.estimated:
        caption += " Times are estimated from the logged throughput: the log has no seconds."
    totals: dict[str, Any] = {
        "Wall time": None if timing.wall is None else duration(timing.wall) + cut_off_text(timing.cut_off),
        "Evaluations": None
        if timing.evaluation is None
        else f"{timing.evaluations}, {duration(timing.evaluation)} together",
        "Most memory, rank 0": None if timing.memory_gb is None else f"{timing.memory_gb:.3g} GB",
        "OAT epoch / cross-entropy epoch": _ratio(timing),
    }
    return section(title, table(head, rows, caption=caption), facts(totals))


def cut_off_text(count: int) -> str:
    """What a wall time leaves out; empty where that is nothing."""
    return f", without {count} start(s) that were cut off" if count else ""


def _ratio(timing: Timing) -> str | None:
    oat, other = timing.phase("oat"), timing.phase("cross_entropy")
    if oat is None or other is None or not oat.epoch_seconds or not other.epoch_seconds:
        return None
    return f"{oat.epoch_seconds / other.epoch_seconds:.3f}"


def _wall(metrics: Metrics) -> tuple[float | None, int]:
    """Seconds from every start or resume to its stop, and how many of them have none."""
    total, cut_off, known = 0.0, 0, False
    began: float | None = None
    for event in metrics.events:
        if event.name in ("start", "resume"):
            cut_off += began is not None
            began = event.moment
        elif event.name in ("stopped", "finished") and began is not None and event.moment is not None:
            total, known, began = total + max(0.0, event.moment - began), True, None
    return (total if known else None), cut_off + (began is not None)


def _steps_per_epoch(run: Run) -> float | None:
    """As evaluation.json says, else of the validation at the end of an epoch; a last one may lie within an epoch."""
    said = run.evaluation.raw.get("steps_per_epoch") if run.evaluation is not None else None
    if type(said) is int and said > 0:
        return said
    return min((row.step / row.epoch for row in run.metrics.validation if row.epoch > 0 and row.step), default=None)


def _median(rows: Sequence[Any], name: str) -> float | None:
    values = [row.values[name] for row in rows if name in row.values]
    return statistics.median(values) if values else None
