"""What a trained run is worth: its last checkpoint, and the best one, on the test split under every protocol.

Kept as ``result.json`` in its folder, and computed anew where that is missing, damaged, or of something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oat_dist.checkpoint import chosen_checkpoint
from oat_dist.commands.evaluation_subject import Subject
from oat_dist.data.index import MANIFEST_NAME
from oat_dist.data.remote.fetch import is_url, local_path
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import CheckpointError, DataError, OatError
from oat_dist.experiments.plan import PlannedRun
from oat_dist.experiments.run_state import read_json, trained_state
from oat_dist.experiments.tables import Table
from oat_dist.files import sha256_file, write_atomic
from oat_dist.report.metrics import METRICS_NAME, Metrics, read_metrics
from oat_dist.validation import network_outputs

__all__ = ["RESULT_NAME", "Judge", "Judged", "Result", "read_result", "write_diverged"]

RESULT_NAME = "result.json"
_FORMAT = 1
_SEEDS = 5  # of protocol batch
_LAST = 10  # epochs whose accuracies are averaged
_KEPT = ("accuracy", "balanced_accuracy", "correct", "total", "top5", "brier", "seeds")


@dataclass(frozen=True)
class Judged:
    """A checkpoint: its accuracies (0..1) by protocol, as accuracy and as balanced."""

    step: int
    epoch: int
    protocols: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        diverged: why the training ended early; None: it did not.
        checkpoints: "final", and "best" where a split has chosen one.
        protocol: of evaluations while it was trained, for a network with anchors.
        epoch_seconds, test_seconds: None: not known.
        raw: all that the file says.
    """

    diverged: str | None
    checkpoints: dict[str, Judged]
    protocol: str
    epoch_seconds: float | None
    test_seconds: float | None
    raw: dict[str, Any]


def read_result(run: PlannedRun, table: Table) -> Result | None:
    """The result of a run, if there is one and it is of these settings, splits and weights."""
    raw = read_json(run.folder / RESULT_NAME)
    asked = {"format": _FORMAT, "key": run.key, "test": table.test, "select": table.select}
    if any(raw.get(key) != value for key, value in asked.items()):
        return None
    try:
        if raw["diverged"] is not None:
            here = _is_here(run, table, raw.get("data", {}))
            return Result(str(raw["diverged"]), {}, "", None, None, raw) if here else None
        found = {str(name): _judged(one) for name, one in raw["checkpoints"].items()}
        times = [None if raw[key] is None else float(raw[key]) for key in ("epoch_seconds", "test_seconds")]
        of_now = all(_weights(run, one["checkpoint"]) in ("", one["weights"]) for one in raw["checkpoints"].values())
        if not of_now or "final" not in found or not _is_here(run, table, raw["data"]):
            return None
        return Result(None, found, str(raw["protocol"]), times[0], times[1], raw)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _judged(one: Mapping[str, Any]) -> Judged:
    protocols = {
        str(name): {"accuracy": float(values["accuracy"]), "balanced": float(values["balanced_accuracy"])}
        for name, values in one["protocols"].items()
    }
    return Judged(int(one["step"]), int(one["epoch"]), protocols)


def _weights(run: PlannedRun, name: str) -> str:
    """The SHA-256 of a checkpoint's weights as its manifest says; empty where the checkpoint is gone."""
    files = read_json(_home(run, name) / "checkpoints" / name / "manifest.json").get("files", {})
    return str(files["model.safetensors"]["sha256"]) if files else ""


def _home(run: PlannedRun, name: str) -> Path:
    """The run folder that holds a checkpoint: the best one may have come before the arms parted."""
    if run.parent is not None and not (run.folder / "checkpoints" / name).is_dir():
        return run.parent.folder
    return run.folder


def _is_here(run: PlannedRun, table: Table, data: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the splits with these digests are those where the data lies now; also where there is none here."""
    splits = {"train": run.config.data.train_split, "select": table.select, "test": table.test}
    found = {name: _digest(run, split) for name, split in splits.items() if split is not None and name in data}
    return all(digest in ("", data[name]["digest"]) for name, digest in found.items())


def _digest(run: PlannedRun, split: str) -> str:
    """Of a split where it lies now; empty where that is not here."""
    if is_url(run.config.data.path):
        return ""
    path = Path(local_path(run.config.data.path)) / split / MANIFEST_NAME
    return sha256_file(path) if path.is_file() else ""


def write_diverged(run: PlannedRun, table: Table, why: str) -> None:
    """That a training has diverged is its result."""
    data = {"train": {"digest": _digest(run, run.config.data.train_split)}}
    _write(run, {"key": run.key, "test": table.test, "select": table.select, "diverged": why, "data": data})


class Judge:
    """Evaluates trained runs, one after the other, in this process.

    Args:
        threads: of the CPU; None: its share of the machine's.
    """

    def __init__(self, table: Table, threads: int | None = None) -> None:
        self._table, self._threads = table, threads
        self._engine: Engine | None = None

    def judge(self, run: PlannedRun, jobs: int | None) -> None:
        """Write the result of a trained run.

        Args:
            jobs: how many trainings ran side by side; None: not known.

        Raises:
            OatError: it cannot be evaluated.
        """
        state = trained_state(run)
        if state is None:
            raise CheckpointError(f"{run.folder}: not trained to its end")
        table = self._table
        trained_on = {"train": {"digest": state["train_digest"]}, "select": {"digest": state["eval_digest"]}}
        if not _is_here(run, table, trained_on):
            raise DataError(
                f"{run.folder}: was trained on other images than {run.config.data.path} holds now; name its own with "
                "--data, or another --output"
            )
        steps = {"final": state["step"]}
        if table.select is not None:
            steps["best"] = state["best"].get("step", state["step"])
        seen: dict[int, dict[str, Any]] = {}
        for step in steps.values():
            if step not in seen:
                seen[step] = self._checkpoint(run, f"step-{step}")
        metrics = read_metrics(run.folder / METRICS_NAME)
        facts = read_json(run.folder / "environment.json")
        _write(
            run,
            {
                "key": run.key,
                "test": table.test,
                "select": table.select,
                "diverged": None,
                "protocol": run.config.eval.protocol,
                "epochs": run.config.epochs,
                "pretrain_epochs": run.config.pretrain_epochs,
                "seed": run.config.seed,
                "checkpoints": {name: seen[step]["judged"] for name, step in steps.items()},
                "select_last_epochs": _last_epochs(metrics),
                "epoch_seconds": _epoch_seconds(metrics, state["phase"]),
                "test_seconds": _test_seconds(metrics, state["phase"]),
                "side_by_side": jobs,
                "data": {
                    "train": {"digest": state["train_digest"], "samples": facts.get("train_samples")},
                    "select": {"digest": state["eval_digest"], "samples": facts.get("eval_samples")},
                    "test": seen[steps["final"]]["data"],
                },
                "hardware": {
                    "device": facts.get("device"),
                    "cpu": _cpu() if jobs is not None else None,
                    "ranks": facts.get("world_size"),
                },
                "versions": {name: facts.get(name) for name in ("oat_dist", "torch", "torchvision", "python")},
                "config": str(run.config_path.name),
                "overrides": list(run.overrides),
            },
        )

    def _checkpoint(self, run: PlannedRun, name: str) -> dict[str, Any]:
        if self._engine is None:
            self._engine = start_engine(name="ddp", threads=self._threads)
        world, home = self._engine.world, _home(run, name)
        asked = argparse.Namespace(data=run.config.data.path, split=self._table.test, seed=None, group_size=None)
        checkpoint = chosen_checkpoint(home, name)
        subject = Subject.load(home, name, asked, world)
        shards = subject.open_split(world)
        with self._engine.memory("lower eval.batch_size; it changes no answer"), torch.no_grad():
            outputs = network_outputs(
                subject.network,
                shards,
                subject.normalise,
                world,
                pipeline=subject.pipeline,
                batch_size=run.config.eval.batch_size,
            )
            assert outputs is not None
            summary = subject.judge(outputs, _SEEDS, None, {}).summary(subject.classes)
        state = checkpoint.json("state.json")
        files = checkpoint.json("manifest.json")["files"]
        bad = {"undecodable": summary["undecodable"]} if summary["undecodable"] else {}
        return {
            "data": {"digest": shards.digest, "samples": shards.num_samples, "source": shards.manifest.source, **bad},
            "judged": {
                "checkpoint": name,
                "weights": files["model.safetensors"]["sha256"],
                "step": state["step"],
                "epoch": state["epoch"],
                "protocols": {
                    protocol: {key: values[key] for key in _KEPT if key in values} | {"ties": len(values["ties"])}
                    for protocol, values in summary["protocols"].items()
                },
            },
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _write(run: PlannedRun, values: dict[str, Any]) -> None:
    path = run.folder / RESULT_NAME
    try:
        write_atomic(path, json.dumps({"format": _FORMAT, **values}, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OatError(f"{path}: cannot be written ({error.strerror})") from error


def _last_epochs(metrics: Metrics) -> dict[str, float]:
    """Mean accuracy over the last evaluations of training, by protocol."""
    last = {name: [row.accuracy for row in metrics.of_protocol(name)[-_LAST:]] for name in metrics.protocols}
    phase = metrics.validation[-1].phase if metrics.validation else ""
    of_phase = {row.protocol for row in metrics.validation if row.phase == phase}
    return {name: statistics.fmean(values) for name, values in last.items() if name in of_phase}


def _epoch_seconds(metrics: Metrics, phase: str) -> float | None:
    """Median over the epochs of a phase of the seconds that their steps took, without evaluations and saving."""
    by_epoch: dict[int, float] = {}
    for row in metrics.training:
        if row.phase == phase and "seconds" in row.values:
            by_epoch[row.epoch] = by_epoch.get(row.epoch, 0.0) + row.values["seconds"]
    return round(statistics.median(by_epoch.values()), 4) if by_epoch else None


def _test_seconds(metrics: Metrics, phase: str) -> float | None:
    """Median over the evaluations of a phase of the seconds that all protocols of one took together."""
    found = {row.step: row.seconds for row in metrics.validation if row.phase == phase and row.seconds is not None}
    return round(statistics.median(found.values()), 4) if found else None


def _cpu() -> str:
    """What the kernel calls the processor; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
