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
from oat_dist.report.evaluation import EVALUATION_NAME, Evaluation, Score, parse_evaluation
from oat_dist.report.metrics import METRICS_NAME, Metrics, read_metrics
from oat_dist.report.predictions import PREDICTIONS_NAME, Predictions, check_predictions, read_predictions

__all__ = ["Run", "flatten", "lookup", "read_run", "wilson"]

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Run:
    """A run folder; `evaluation` and `predictions` are None where there are none, `config_text` is the file as it is.

    `warnings` are lines of text about what is missing or odd; those of the trainer are among them.
    """

    name: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: Metrics
    evaluation: Evaluation | None
    predictions: Predictions | None
    warnings: list[str]

    @property
    def protocol(self) -> str:
        """The protocol of the headline: the configured one, or argmax for a network trained without OAT."""
        known = [score.protocol for score in self.scores]
        configured = lookup(self.config, "eval.protocol")
        choice = [name for name in (configured, "batch", "argmax") if name in known]
        return choice[0] if choice else (known or ["batch"])[0]

    @property
    def last_validation(self) -> list[Any]:
        """The rows of the last evaluation in training, one a protocol."""
        rows = self.metrics.validation
        return [row for row in rows if (row.step, row.split) == (rows[-1].step, rows[-1].split)]

    @property
    def score(self) -> Score | None:
        """The headline: the last evaluation of training under `protocol`, not what was saved over it later."""
        scores = self.scores
        return next((score for score in scores if score.protocol == self.protocol), scores[0] if scores else None)

    @property
    def scores(self) -> list[Score]:
        """Of the last validation: from evaluation.json where that is of it, else from the log."""
        if self.evaluation is not None and self.evaluated_last:
            return self.evaluation.scores
        return [Score(row.protocol, row.accuracy, row.correct, row.total) for row in self.last_validation]

    @property
    def evaluated_last(self) -> bool:
        """True when evaluation.json is of the step, split and data of the last validation, or none was logged."""
        if self.evaluation is None or not self.evaluation.scores:
            return False
        if not self.metrics.validation:
            return True
        raw, last = self.evaluation.raw, self.metrics.validation[-1]
        digests = raw.get("eval_digest"), self.environment.get("eval_digest")
        same_data = None in digests or digests[0] == digests[1]
        return raw.get("step") == last.step and raw.get("split") == last.split and same_data

    @property
    def split(self) -> str:
        """The split of the headline, empty where it is not known."""
        if self.evaluation is not None and self.evaluated_last:
            return str(self.evaluation.raw.get("split") or "")
        return self.last_validation[-1].split if self.last_validation else ""

    @property
    def evaluated_on(self) -> tuple[str, str]:
        """Split and digest of the headline's data, each empty where it is not known."""
        saved = self.evaluation.raw.get("eval_digest") if self.evaluation is not None and self.evaluated_last else None
        return self.split, str(saved or self.environment.get("eval_digest") or "")

    @property
    def selected_on(self) -> str:
        """The split that selected the evaluated checkpoint, where it was evaluated on that very split; else empty."""
        if self.evaluation is None or not self.metrics.validation:
            return ""
        raw = self.evaluation.raw
        best, step = raw.get("best"), raw.get("step")
        if not isinstance(best, Mapping) or type(step) is not int:
            return ""
        chosen = best.get("step") == step or (best.get("checkpoint") or "?") == raw.get("checkpoint")
        later = self.metrics.validation[-1].step > step
        same = best.get("split") is not None and best.get("split") == raw.get("split")
        return str(best["split"]) if chosen and later and same else ""

    @property
    def trained_with_oat(self) -> bool:
        """True when the last phase was OAT."""
        rows = self.metrics.training or self.metrics.validation
        return bool(rows) and rows[-1].phase == "oat"


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as fractions of 1."""
    p, z2 = correct / total, _Z95**2 / total
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) + z2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


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
    evaluation = None
    if (folder / EVALUATION_NAME).exists():
        path = folder / EVALUATION_NAME
        evaluation = parse_evaluation(_parse(path, _read_text(path, warnings), warnings), warnings)
    predictions = read_predictions(folder / PREDICTIONS_NAME, warnings)
    run = Run(
        name=folder.resolve().name,
        config=_parse(folder / "config.yaml", config_text, warnings),
        config_text=config_text,
        environment=_parse(folder / "environment.json", _read_text(folder / "environment.json", warnings), warnings),
        metrics=metrics,
        evaluation=evaluation,
        predictions=check_predictions(predictions, evaluation, warnings),
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
        json.dumps(values, skipkeys=True, default=str)  # ValueError where it refers to itself
        flatten(values)
    except (ValueError, RecursionError, yaml.YAMLError):
        warnings.append(f"{path.name} is damaged and was left out.")
        return {}
    if not isinstance(values, dict):
        warnings.append(f"{path.name} does not hold a mapping and was left out.")
        return {}
    return values


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
    said = {e.text: e for e in metrics.events if e.name == "warning" and e.text}  # each text once
    found += [f"{text} (step {e.step:,})" if e.step is not None else text for text, e in said.items()]
    return found


def _evaluation_warnings(run: Run) -> list[str]:
    if run.evaluation is None or not run.metrics.training:
        return []
    found = []
    if run.evaluation.scores and not run.evaluated_last:
        raw = run.evaluation.raw
        found.append(
            f"{EVALUATION_NAME} (split {raw.get('split')}, checkpoint {raw.get('checkpoint')}) is not of the last "
            "validation: classes, confusions and mistakes are of it, the headline is not."
        )
    evaluated, last = run.evaluation.raw.get("step"), run.metrics.training[-1].step
    if type(evaluated) is int and evaluated < last:
        found.append(f"The evaluated checkpoint is of step {evaluated:,}; the log goes on to step {last:,}.")
    return found
