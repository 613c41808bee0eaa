"""How far the run of a plan is, as its folder says: nothing here starts or changes one."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from oat_dist.config import load_config
from oat_dist.errors import ConfigError
from oat_dist.experiments.plan import PlannedRun, training_key

__all__ = ["epochs_done", "is_busy", "outcome_of", "read_json", "trained_state"]

_TAIL = 1 << 16  # bytes of a log that hold its last line


def trained_state(run: PlannedRun) -> dict[str, Any] | None:
    """state.json of the last checkpoint of a run that has nothing left to train or evaluate; None: it has, or is not
    trained with these settings."""
    checkpoints = run.folder / "checkpoints"
    try:
        name = (checkpoints / "latest").read_text().strip()
        config = load_config(run.folder / "config.yaml")
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    if Path(name).name != name or training_key(config) != run.key:
        return None
    state, evaluation = read_json(checkpoints / name / "state.json"), read_json(run.folder / "evaluation.json")
    try:
        total = min(run.config.epochs * state["steps_per_epoch"], run.config.max_steps or sys.maxsize)
        done = state["step"] >= total and evaluation["step"] == state["step"]
        return {**state, "best": evaluation["best"]} if done else None
    except (KeyError, TypeError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def epochs_done(run: PlannedRun) -> float:
    """Epochs of the run so far, those of its parent included, by the last line of its log."""
    begun = 0 if run.parent is None else run.parent.config.epochs
    try:
        with (run.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return begun
    for line in reversed(lines):
        try:
            values = json.loads(line)
            # A line of training counts its epoch from 0, one of an evaluation the finished ones.
            return max(begun, values["epoch"] + ("loss" in values) / 2)
        except (ValueError, KeyError, TypeError):
            continue
    return begun


def outcome_of(run: PlannedRun) -> str:
    """How its last start ended, as job.outcome_file says; empty where it does not."""
    try:
        words = (run.folder / "outcome").read_text(errors="replace").split()
    except OSError:
        return ""
    return words[0] if words else ""


def is_busy(run: PlannedRun) -> bool:
    """Whether some process is training in its folder."""
    try:
        with (run.folder / ".lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        pass
    return False
