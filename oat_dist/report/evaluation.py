"""evaluation.json as the report takes it: every number checked, what is missing left None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oat_dist.report.metrics import PROTOCOLS

__all__ = ["EVALUATION_NAME", "Evaluation", "Score", "Seeds", "fraction", "in_order", "parse_evaluation"]

EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Seeds:
    """Accuracies (0..1) under `count` seeds of the groups of protocol "batch"."""

    count: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Accuracy (0..1) under one protocol, with its counts and further measures where they are known.

    `interval` and `balanced_interval` are 95 % bootstrap intervals of fractions; `brier` is in 0..2.
    """

    protocol: str
    accuracy: float
    correct: int | None = None
    total: int | None = None
    interval: tuple[float, float] | None = None
    top5: float | None = None
    balanced: float | None = None
    balanced_interval: tuple[float, float] | None = None
    brier: float | None = None
    seeds: Seeds | None = None


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: `scores` in our order of protocols, `raw` the whole file.

    `confusion` holds, for each protocol, {(true class, predicted class): samples}; classes count from 0.
    """

    scores: list[Score]
    class_names: list[str]
    per_class: dict[str, list[float | None]]
    raw: dict[str, Any]
    confusion: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)

    def score(self, protocol: str) -> Score | None:
        return next((score for score in self.scores if score.protocol == protocol), None)

    def class_name(self, number: int) -> str:
        return self.class_names[number] if 0 <= number < len(self.class_names) else f"class {number}"


def fraction(value: Any) -> float | None:
    """`value` as a number in 0..1, None where it is none."""
    return _within(value, 1.0)


def in_order(protocols: Mapping[str, Any]) -> list[str]:
    """Names of protocols: ours first and in our order, then others by name."""
    return [p for p in PROTOCOLS if p in protocols] + sorted(set(protocols).difference(PROTOCOLS))


def parse_evaluation(raw: dict[str, Any], warnings: list[str]) -> Evaluation | None:
    """The evaluation in a parsed evaluation.json; None and a warning where it holds none."""
    protocols = raw.get("protocols")
    if not isinstance(protocols, Mapping):
        warnings.append(
            f"{EVALUATION_NAME} holds no accuracies and was left out; start the training again to write it anew."
        )
        return None
    scores = []
    for name in in_order(protocols):
        values = protocols[name] if isinstance(protocols[name], Mapping) else {}
        score = _score(name, values, raw.get("total"), warnings)
        if score is not None:
            scores.append(score)
    names = raw.get("class_names")
    class_names = [str(name) for name in names] if isinstance(names, list) else []
    confusion = {name: _cells(name, rows, warnings) for name, rows in _lists(raw.get("confusion")).items()}
    return Evaluation(scores, class_names, _per_class(raw.get("per_class")), raw, confusion)


def _score(name: str, values: Mapping[str, Any], all_samples: Any, warnings: list[str]) -> Score | None:
    correct, total = _count(values.get("correct")), _count(values.get("total", all_samples))
    accuracy = fraction(values.get("accuracy"))
    if "accuracy" not in values and correct is not None and total:
        accuracy = fraction(correct / total)
    if accuracy is None:
        warnings.append(f"{EVALUATION_NAME}: the accuracy under {name!r} is not a number in 0..1 and was left out.")
        return None
    if correct is not None and total and abs(accuracy - correct / total) > 1e-6:
        warnings.append(f"{EVALUATION_NAME}: the accuracy under {name!r} is not {correct:,} of {total:,}.")
    return Score(
        name,
        accuracy,
        correct,
        total,
        interval=_interval(values.get("interval")),
        top5=fraction(values.get("top5")),
        balanced=fraction(values.get("balanced_accuracy")),
        balanced_interval=_interval(values.get("balanced_interval")),
        brier=_within(values.get("brier"), 2.0),
        seeds=_seeds(values.get("seeds")),
    )


def _within(value: Any, most: float) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= most else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = map(fraction, value)
    return None if low is None or high is None or low > high else (low, high)


def _seeds(value: Any) -> Seeds | None:
    if not isinstance(value, Mapping):
        return None
    count = _count(value.get("count"))
    mean, std, low, high = (fraction(value.get(key)) for key in ("mean", "std", "min", "max"))
    if not count or mean is None or std is None or low is None or high is None:
        return None
    return Seeds(count, mean, std, low, high)


def _lists(value: Any) -> dict[str, Sequence[Any]]:
    """The lists of a mapping, ours first and in our order."""
    if not isinstance(value, Mapping):
        return {}
    rows = {str(name): rows for name, rows in value.items() if isinstance(rows, list)}
    return {name: rows[name] for name in in_order(rows)}


def _per_class(value: Any) -> dict[str, list[float | None]]:
    """Accuracies by protocol; None for a class without samples (null or NaN in the file)."""
    return {name: [fraction(accuracy) for accuracy in rows] for name, rows in _lists(value).items()}


def _cells(name: str, rows: Sequence[Any], warnings: list[str]) -> dict[tuple[int, int], int]:
    """The cells of a confusion matrix; what is no [true, predicted, count] is left out, with one warning."""
    cells: dict[tuple[int, int], int] = {}
    bad = 0
    for row in rows:
        counts = [_count(value) for value in row] if isinstance(row, list) and len(row) == 3 else []
        if not counts or None in counts or (row[0], row[1]) in cells:
            bad += 1
        else:
            cells[row[0], row[1]] = row[2]
    if bad:
        warnings.append(f"{EVALUATION_NAME}: {bad:,} cell(s) of the confusion under {name!r} not understood, left out.")
    return {cell: count for cell, count in cells.items() if count}
