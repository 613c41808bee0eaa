"""What experiment trackers get of a run: the lines of metrics.jsonl, as they are written.

A tracker is an addition: metrics.jsonl has everything. So one that cannot be started stops the run before its first
step, but one that fails later (a network that is gone) is dropped with a warning.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oat_dist.data.remote.fetch import shown_text
from oat_dist.engine import Engine
from oat_dist.engine.trackers import TrackedRun, check_installed, own_id
from oat_dist.files import write_atomic

__all__ = ["Trackers", "scalars", "summary"]

_NOT_SCALARS = frozenset({"step", "epoch", "fingerprint", "seconds"})


class Trackers:
    """The trackers of a run, on rank 0. On the other ranks every method does nothing.

    Args:
        names: of Accelerate's trackers.
        engine: whose Accelerator starts them.
        warn: is told, in one line, of one that fails.

    Raises:
        ConfigError: on every rank, when rank 0 lacks a tracker's package.
    """

    def __init__(self, names: Sequence[str], engine: Engine, warn: Callable[[str], None]) -> None:
        self.names, self._engine, self._warn = names, engine, warn
        self._running: list[Any] = []
        engine.world.together(check_installed, names if engine.world.is_main else ())

    def start(self, run: Path, project: str, settings: Mapping[str, Any], step: int | None) -> None:
        """Start them; all ranks call it.

        Args:
            run: the folder of the run, whose name is the run's; ``<run>/trackers`` is theirs.
            project: under which they list the run.
            settings: hyper-parameters by dotted name.
            step: from which the run goes on, in the same run of each tracker that can do so; None: a new run.

        Raises:
            LaunchError: on every rank, when one of them cannot be started.
        """
        if self.names:
            self._engine.world.together(self._start, run, project, settings, step)

    def _start(self, run: Path, project: str, settings: Mapping[str, Any], step: int | None) -> None:
        if not self._engine.world.is_main:
            return
        file = run / "trackers" / "runs.json"
        before = _read(file) if step is not None else {}
        run_id, known = before.get("id") or secrets.token_hex(11)[:21], before.get("known") or {}
        self._running = self._engine.start_trackers(
            self.names,
            TrackedRun(
                project=project,
                name=run.resolve().name,
                run_id=run_id,
                known=known,
                folder=file.parent,
                step=step or 0,
                settings={key: _plain(value) for key, value in settings.items()},
            ),
        )
        known |= {tracker.name: own_id(tracker) for tracker in self._running}
        write_atomic(file, json.dumps({"id": run_id, "known": known}, indent=1) + "\n")

    def record(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._running and "event" not in line:
            self.log(scalars(line), line["step"])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, as of `step`."""
        if values:
            self._each("log", lambda tracker: tracker.log(dict(values), step=step))

    def close(self) -> None:
        """Let them write what they still hold."""
        self._each("finish", lambda tracker: tracker.finish())
        self._running = []

    def _each(self, what: str, action: Callable[[Any], None]) -> None:
        for tracker in list(self._running):
            try:
                action(tracker)
            except Exception as error:  # theirs to choose: each package has errors of its own
                self._running.remove(tracker)
                said = " ".join(str(error).split()) or type(error).__name__
                self._warn(
                    f"warning: tracker {tracker.name} failed in {what} ({said}) and is told nothing more; "
                    "metrics.jsonl has everything"
                )


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get of a line: ``train/loss``, ``train/lr``, ...; ``accuracy/<protocol>``; nothing of others."""
    if "protocol" in line:
        return {f"accuracy/{line['protocol']}": line["accuracy"]}
    if "loss" not in line:
        return {}
    numbers = {key: value for key, value in line.items() if type(value) in (int, float)}
    return {f"train/{key}": value for key, value in numbers.items() if key not in _NOT_SCALARS}


def summary(best: Mapping[str, Any], accuracies: Mapping[str, float]) -> dict[str, float]:
    """What trackers get at the end: ``final/accuracy/<protocol>``; ``best/accuracy`` and ``best/step``."""
    values = {f"final/accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
    return values | {f"best/{key}": best[key] for key in ("accuracy", "step") if key in best}


def _read(file: Path) -> dict[str, Any]:
    """What `runs.json` says; empty where there is none that can be read: the run is then new to its trackers."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    known = found.get("known") if isinstance(found, dict) else None
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in [found.get("id"), *known.values()]):
        return {}
    return found


def _plain(value: Any) -> bool | int | float | str:
    """A setting as every tracker takes it, without the secrets of a URL."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "null" if value is None else shown_text(str(value))
