"""Everything a run folder says about its run, with what is missing or odd listed as warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oat_dist.errors import DataError
from oat_dist.report.metrics import METRICS_NAME, PROTOCOLS, Metrics, read_metrics

__all__ = ["Evaluation", "Run", "Score", "flatten", "fraction", "lookup", "read_run", "wilson"]

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Accuracy (0..1) under one protocol, with its counts where they are known."""

    protocol: str
    accuracy: float
    correct: int | None
    total: int | None


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: `scores` in our order of protocols, `raw` the whole file."""

    scores: list[Score]
    class_names: list[str]
    per_class: dict[str, list[float | None]]
    raw: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder. `evaluation` is None where there is none; `config_text` is the file as it stands."""

    name: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: Metrics
    evaluation: Evaluation | None
    warnings: list[str]


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as fractions of 1."""
    p, z2 = correct / total, _Z95**2 / total
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) + z2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def fraction(value: Any) -> float | None:
    """`value` as a number in 0..1, None where it is none."""
    return float(value) if type(value) in (int, float) and 0 <= value <= 1 else None


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(values, Mapping) or (not values and prefix):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def lookup(values: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key, None where there is none."""
    return flatten(values).get(dotted)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: `folder` is no folder, or holds no metrics.jsonl.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder; give the output_dir of a training run")
    if not (folder / METRICS_NAME).is_file():
        raise DataError(f"{folder}: not a run folder, {METRICS_NAME} is missing; give the output_dir of a training run")
    warnings: list[str] = []
    metrics = read_metrics(folder / METRICS_NAME)
    config_text = _read_text(folder / "config.yaml", warnings)
    run = Run(
        name=folder.resolve().name,
        config=_parse(folder / "config.yaml", config_text, warnings),
        config_text=config_text,
        environment=_parse(folder / "environment.json", _read_text(folder / "environment.json", warnings), warnings),
        metrics=metrics,
        evaluation=_read_evaluation(folder / "evaluation.json", warnings),
        warnings=warnings,
    )
    warnings += _metrics_warnings(metrics) + _evaluation_warnings(run)
    return run


def _read_text(path: Path, warnings: list[str]) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError as error:
        warnings.append(f"{path.name} cannot be read ({error.strerror}).")
        return ""


def _parse(path: Path, text: str, warnings: list[str]) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds; {} and a warning where it holds none."""
    if not text:
        return {}
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        warnings.append(f"{path.name} is damaged and was left out.")
        return {}
    if not isinstance(values, dict):
        warnings.append(f"{path.name} does not hold a mapping and was left out.")
        return {}
    return values


def _read_evaluation(path: Path, warnings: list[str]) -> Evaluation | None:
    if not path.exists():
        return None
    raw = _parse(path, _read_text(path, warnings), warnings)
    protocols = raw.get("protocols")
    if not isinstance(protocols, Mapping):
        warnings.append(f"{path.name} holds no accuracies and was left out; start the training again to write it anew.")
        return None
    scores = []
    for name in [p for p in PROTOCOLS if p in protocols] + sorted(set(protocols).difference(PROTOCOLS)):
        values = protocols[name] if isinstance(protocols[name], Mapping) else {}
        correct, total = _count(values.get("correct")), _count(values.get("total", raw.get("total")))
        accuracy = fraction(values.get("accuracy"))
        if "accuracy" not in values and correct is not None and total:
            accuracy = fraction(correct / total)
        if accuracy is None:
            warnings.append(f"{path.name}: the accuracy under {name!r} is not a number in 0..1 and was left out.")
            continue
        if correct is not None and total and abs(accuracy - correct / total) > 1e-6:
            warnings.append(f"{path.name}: the accuracy under {name!r} is not {correct:,} of {total:,}.")
        scores.append(Score(name, accuracy, correct, total))
    return Evaluation(scores, _names(raw.get("class_names")), _per_class(raw.get("per_class")), raw)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _per_class(value: Any) -> dict[str, list[float | None]]:
    """Accuracies by protocol; None for a class without samples (null or NaN in the file)."""
    if not isinstance(value, Mapping):
        return {}
    rows = {name: accuracies for name, accuracies in value.items() if isinstance(accuracies, list)}
    order = [p for p in PROTOCOLS if p in rows] + sorted(set(rows).difference(PROTOCOLS))
    return {name: [fraction(a) for a in rows[name]] for name in order}


def _metrics_warnings(metrics: Metrics) -> list[str]:
    found = []
    if metrics.lines_skipped:
        numbers = ", ".join(str(n) for n in metrics.lines_skipped[:10])
        more = ", ..." if len(metrics.lines_skipped) > 10 else ""
        count = len(metrics.lines_skipped)
        word = "lines" if count > 1 else "line"
        found.append(f"{METRICS_NAME}: {count} {word} not understood and skipped ({word} {numbers}{more}).")
    if metrics.non_finite:
        found.append(f"{METRICS_NAME}: {metrics.non_finite} number(s) not finite (NaN or infinity), left out.")
    if metrics.replayed_different:
        steps = ", ".join(str(n) for n in metrics.replayed_different[:10])
        found.append(
            f"Fingerprints differ between the first and a later pass over the same steps ({steps}): "
            "the run resumed with another data order."
        )
    return found


def _evaluation_warnings(run: Run) -> list[str]:
    if run.evaluation is None or not run.metrics.training:
        return []
    evaluated, last = _count(run.evaluation.raw.get("step")), run.metrics.training[-1].step
    if evaluated is not None and evaluated < last:
        return [f"The evaluated checkpoint is of step {evaluated:,}; the log goes on to step {last:,}."]
    return []
