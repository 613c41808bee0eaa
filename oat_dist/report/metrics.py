"""metrics.jsonl, read as what it is: a log that crashes may tear and resumed runs may write twice.

1. A last line without its newline that does not parse was cut by a crash, or is being written: it is ignored.
2. Any other line that is not one of ours is skipped and its number kept, for a warning.
3. A `start` or `resume` event at step s takes back every line after step s: those steps are trained again.
   Where a step trained again logs another fingerprint than before, the data order changed; that is kept too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oat_dist.errors import DataError

__all__ = [
    "METRICS_NAME",
    "PROTOCOLS",
    "Anchor",
    "Event",
    "Metrics",
    "Switch",
    "Training",
    "Validation",
    "phase_name",
    "read_metrics",
    "utc_text",
]

METRICS_NAME = "metrics.jsonl"
_LARGEST = 1e300
PROTOCOLS = ("argmax", "batch", "single", "dataset", "stored", "balanced", "given")  # in the order they are shown in


@dataclass(frozen=True)
class Training:
    """One logged training step; `values` holds its finite numbers (loss, lr, samples_per_s, ...) by name."""

    step: int
    epoch: int
    phase: str
    values: dict[str, float]
    fingerprint: str | None


@dataclass(frozen=True)
class Validation:
    """One accuracy (0..1) under one protocol, after `epoch` finished epochs; `seconds` the whole evaluation took."""

    step: int
    epoch: int
    phase: str
    split: str
    protocol: str
    accuracy: float
    correct: int | None
    total: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class Anchor:
    """The mean training anchor, one number a class, of the epoch that made `epoch` finished ones."""

    step: int
    epoch: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Event:
    """Start, resume, phase change, warning, stop or end of the run.

    `time` is UTC text, empty where the line has none, `moment` the same as seconds since 1970. `text` is what a warning
    says, `start_from` of which checkpoint of another run this one is a copy.
    """

    name: str
    step: int | None
    time: str
    moment: float | None = None
    text: str = ""
    start_from: str = ""


@dataclass(frozen=True)
class Switch:
    """A change of phase at `step`, when `epoch` epochs were finished."""

    step: int
    epoch: int
    phase: str


@dataclass
class Metrics:
    """The log with superseded lines taken out. `lines_skipped` are line numbers, from 1."""

    training: list[Training] = field(default_factory=list)
    validation: list[Validation] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lines_skipped: list[int] = field(default_factory=list)
    non_finite: int = 0
    replayed_equal: int = 0
    replayed_different: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """True when the run ended by itself and was not taken up again."""
        state = [event.name for event in self.events if event.name in ("start", "resume", "finished")]
        return bool(state) and state[-1] == "finished"

    @property
    def switches(self) -> list[Switch]:
        """Every change of phase between two logged training steps."""
        announced = [event.step for event in self.events if event.name == "phase" and event.step is not None]
        found = []
        for before, after in zip(self.training, self.training[1:], strict=False):
            if before.phase != after.phase:
                exact = [step for step in announced if before.step <= step <= after.step]
                found.append(Switch(exact[-1] if exact else before.step, after.epoch, after.phase))
        return found

    @property
    def protocols(self) -> list[str]:
        """Protocols that were validated, ours first and in our order."""
        seen = {row.protocol for row in self.validation}
        return [name for name in PROTOCOLS if name in seen] + sorted(seen.difference(PROTOCOLS))

    def of_protocol(self, protocol: str) -> list[Validation]:
        return [row for row in self.validation if row.protocol == protocol]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the training lines that hold a finite `name`."""
        rows = [row for row in self.training if name in row.values]
        return [row.step for row in rows], [row.values[name] for row in rows]


def phase_name(phase: str) -> str:
    """A phase as readers call it."""
    return {"cross_entropy": "cross-entropy", "oat": "OAT"}.get(phase, phase)


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the output_dir of a training run") from error
    metrics = Metrics()
    fingerprints: dict[int, str] = {}
    lines = text.split("\n")  # only \n ends a line: JSON texts may hold U+2028 and the like
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _add(metrics, json.loads(line), fingerprints)
        except (json.JSONDecodeError, RecursionError, KeyError, TypeError, ValueError, OverflowError):
            if number < len(lines):
                metrics.lines_skipped.append(number)
    return _last_of_each(metrics)


def _add(metrics: Metrics, line: Any, fingerprints: dict[int, str]) -> None:
    """Sort one parsed line into `metrics`; KeyError, TypeError or ValueError when it is none of ours."""
    if "event" in line:
        step = None if line.get("step") is None else _count(line["step"])
        time, texts = line.get("time"), [_text(line.get(key, "")) for key in ("text", "start_from")]
        event = Event(_text(line["event"]), step, utc_text(time), _moment(time), *texts)
        if event.name in ("start", "resume") and step is not None:
            metrics.training = [row for row in metrics.training if row.step <= step]
            metrics.validation = [row for row in metrics.validation if row.step <= step]
            metrics.anchors = [row for row in metrics.anchors if row.step <= step]
        metrics.events.append(event)
    elif "protocol" in line:
        metrics.validation.append(_validation(line))
    elif "anchor" in line and "loss" not in line:
        metrics.anchors.append(_anchor(line))
    else:
        row = _training(line)
        metrics.non_finite += sum(isinstance(v, float) and not _drawable(v) for v in line.values())
        metrics.training.append(row)
        if row.fingerprint is not None:
            before = fingerprints.get(row.step)
            if before == row.fingerprint:
                metrics.replayed_equal += 1
            elif before is not None:
                metrics.replayed_different.append(row.step)
            fingerprints[row.step] = row.fingerprint


def _validation(line: Mapping[str, Any]) -> Validation:
    accuracy = float(line["accuracy"])
    if not 0 <= accuracy <= 1:
        raise ValueError("an accuracy lies in 0..1")
    counts = {key: None if line.get(key) is None else _count(line[key]) for key in ("correct", "total")}
    return Validation(
        step=_count(line["step"]),
        epoch=_count(line["epoch"]),
        phase=_text(line["phase"]),
        split=_text(line["split"]),
        protocol=_text(line["protocol"]),
        accuracy=accuracy,
        correct=counts["correct"],
        total=counts["total"],
        seconds=_duration(line.get("seconds")),
    )


def _anchor(line: Mapping[str, Any]) -> Anchor:
    values = tuple(map(float, line["anchor"]))
    if not values or not all(map(math.isfinite, values)):
        raise ValueError("an anchor has finite numbers")
    return Anchor(_count(line["step"]), _count(line["epoch"]), values)


def _training(line: Mapping[str, Any]) -> Training:
    float(line["loss"])  # what makes a line a training line
    numbers = {key: value for key, value in line.items() if type(value) in (int, float) and _drawable(value)}
    fingerprint = line.get("fingerprint")
    return Training(
        step=_count(line["step"]),
        epoch=_count(line["epoch"]),
        phase=_text(line["phase"]),
        values={key: float(value) for key, value in numbers.items() if key not in ("step", "epoch")},
        fingerprint=None if fingerprint is None else _text(fingerprint),
    )


def _drawable(value: float) -> bool:
    """Finite, and so far from the largest float that an axis has room above it."""
    return math.isfinite(value) and abs(value) <= _LARGEST


def _last_of_each(metrics: Metrics) -> Metrics:
    """Order by step; of two lines about the same thing the later one counts."""
    training = {row.step: row for row in metrics.training}
    validation = {(row.step, row.protocol, row.split): row for row in metrics.validation}
    metrics.training = [training[step] for step in sorted(training)]
    metrics.validation = sorted(validation.values(), key=lambda row: row.step)
    anchors = {row.step: row for row in metrics.anchors}
    metrics.anchors = [anchors[step] for step in sorted(anchors)]
    return metrics


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError("not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value.encode(errors="replace").decode()  # a lone surrogate could not be written anywhere


def _duration(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < math.inf else None


def _moment(value: Any) -> float | None:
    """Seconds since 1970, where `value` says so clearly."""
    if type(value) in (int, float):
        return float(value) if math.isfinite(value) else None
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return None if moment.tzinfo is None else moment.timestamp()


def utc_text(value: Any) -> str:
    """Seconds since 1970 or ISO text, as UTC text; empty for anything else."""
    if type(value) in (int, float):
        try:
            moment = datetime.fromtimestamp(value, UTC)
        except (ValueError, OverflowError, OSError):  # not a time that there is
            return ""
    elif isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return _text(value)
        if moment.tzinfo is None:  # no zone said: guess none
            return moment.strftime("%Y-%m-%d %H:%M:%S")
        moment = moment.astimezone(UTC)
    else:
        return ""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
