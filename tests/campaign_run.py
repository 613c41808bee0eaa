"""One run of the fault campaign: its starts, the ranks of each, what they leave, and what it must be compared with.

A start is what a scheduler would do: every rank a real process, forked from one that has done the imports. The run's
folder is all that a start knows of the ones before it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import free_port, rank_environment, rank_server

from oat_dist.checkpoint import verify

CONFIG = """\
output_dir: unset
batch_size: 47
epochs: 1000
pretrain_epochs: 1
max_steps: 400
data: {path: unset, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 0.005}
checkpoint: {every_steps: 7, keep: 3}
engine: {threads: 1, timeout_minutes: 5}
job: {check_seconds: 0.05}
eval: {every_epochs: 1, batch_size: 16}
log: {every_steps: 1}
"""
# Longer than any start takes on a busy machine; a run that needs more is lost.
DEADLINE = 180.0


@dataclass(frozen=True)
class Case:
    """Under which engine, with whose anchors, on how many ranks."""

    engine: str
    scope: str
    world: int

    def __str__(self) -> str:
        return f"{self.engine}, {self.scope}, {self.world} ranks"


class Start:
    """The ranks of one start of a run."""

    def __init__(self, run: Run, overrides: tuple[str, ...] = ()) -> None:
        self.folder = run.root / f"start-{run.starts}"
        self.folder.mkdir(parents=True)
        self.outcome_file = self.folder / "outcome"
        self.stop_file = self.folder / "stop"
        arguments = [
            *(str(run.config), *run.overrides),
            *(f"job.outcome_file={self.outcome_file}", f"job.stop_file={self.stop_file}", *overrides),
        ]
        self.left: list[int] = []  # ranks that did not end by themselves
        port = free_port()
        server = rank_server()
        self.codes: dict[int, int | None] = {}
        for rank in range(run.case.world):
            environment = rank_environment(rank, run.case.world, port)
            target = "campaign_rank:train"
            self.codes[server.start(environment, target, json.dumps(arguments), str(self.folder))] = None

    @property
    def pids(self) -> list[int]:
        return list(self.codes)

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        for pid, code in self.codes.items():
            if code is None:
                self.codes[pid] = rank_server().status(pid)
        return [pid for pid, code in self.codes.items() if code is None]

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """To one rank, or to all."""
        alive = self.running()
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid in alive:
                os.kill(pid, number)

    def wait(self, until: Callable[[], bool], what: str) -> bool:
        """Wait for something to happen, or for all ranks to end; whether it has happened."""
        deadline = time.monotonic() + DEADLINE
        while not until():
            if not self.running():
                return until()
            assert time.monotonic() < deadline, f"{self.folder}: no end of waiting until {what}:\n{self.said()}"
            time.sleep(0.001)
        return True

    def end(self, patience: float = 30.0) -> None:
        """Let the ranks end by themselves once one of them has; what is left then was stopped or hangs.

        ``srun --kill-on-bad-exit`` and the launchers do so, but with less patience: peers are to find out alone.
        """
        self.wait(lambda: len(self.running()) < len(self.pids), "a rank ends")
        deadline = time.monotonic() + patience
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.left = self.running()
        self.kill()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        while self.running():
            time.sleep(0.01)

    def said(self) -> str:
        """What the ranks wrote to stderr."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("stderr-*")))

    def outcome(self) -> str:
        """The state of the outcome file; empty where there is none."""
        try:
            return self.outcome_file.read_text().split()[0]
        except FileNotFoundError:
            return ""


@dataclass
class Run:
    """A run that is started again and again, until it has finished.

    Args:
        root: a folder of its own.
        data: the packed digits.
        steps: of the whole run.
    """

    root: Path
    data: Path
    case: Case
    steps: int
    seed: int = 0
    starts: int = 0
    events: int = 0  # starts and resumes in the log that have been looked at
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.folder = self.root / "disk" / "run"
        self.folder.parent.mkdir()
        self.checkpoints = self.folder / "checkpoints"
        self.config = self.root / "config.yaml"
        self.config.write_text(CONFIG)

    @property
    def overrides(self) -> list[str]:
        """What every start of this run is given."""
        return [
            *(f"output_dir={self.folder}", f"data.path={self.data}", f"max_steps={self.steps}", f"seed={self.seed}"),
            *(f"engine.name={self.case.engine}", f"anchor.scope={self.case.scope}"),
        ]

    def start(self, *overrides: str) -> Start:
        self.starts += 1
        return Start(self, overrides)

    def finish(self) -> None:
        """Start it once more and leave it alone."""
        before = self.newest()
        start = self.start()
        start.wait(lambda: False, "the run ends")
        self.check_resume(before, start)
        if start.outcome() != "finished":
            self.problems.append(f"left alone, the run ended as {start.outcome() or 'killed'}: {start.said()}")

    def newest(self) -> int:
        """The step of the newest whole checkpoint; 0 for none. Looked up by this process, not by the run."""
        steps = sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-*"))
        return next((step for step in reversed(steps) if verify(self.checkpoints / f"step-{step}") is None), 0)

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def step(self) -> int:
        """The last step that was logged."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - 4000, 0))
                lines = file.read().splitlines()[:-1]  # the last may be a part only
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            if line.startswith(b'{"step"') and b'"loss"' in line:
                return int(json.loads(line)["step"])
        return 0

    def check_resume(self, expected: int, start: Start) -> None:
        """A start must have gone on from the newest whole checkpoint there was, if it came so far at all."""
        events = [line for line in self.lines() if line.get("event") in ("start", "resume")]
        known, self.events = self.events, len(events)
        for event in events[known:]:
            if event["step"] != expected:
                self.problems.append(f"start {self.starts} went on from step {event['step']}, not from {expected}")
        if "Traceback" in start.said():
            self.problems.append(f"start {self.starts} ended in a traceback:\n{start.said()}")

    def steps_taken(self) -> set[tuple[int, float, str]]:
        """(step, loss, fingerprint) of every step, also of those that were taken twice: a set, as they must agree."""
        return {(line["step"], line["loss"], line["fingerprint"]) for line in self.lines() if "loss" in line}

    def accuracies(self) -> set[tuple[int, str, float]]:
        return {(line["step"], line["protocol"], line["accuracy"]) for line in self.lines() if "protocol" in line}

    def final(self) -> dict[str, bytes]:
        """Weights, optimizer, stored anchor, and what each rank keeps, after the last step."""
        folder = self.checkpoints / f"step-{self.steps}"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}

    def compare(self, calm: Run) -> None:
        """With a run of the same case that nobody disturbed: bit by bit."""
        if not self.final() or self.final() != calm.final():
            different = [name for name, data in calm.final().items() if self.final().get(name) != data]
            self.problems.append(f"the run did not end as the undisturbed one: {different} differ")
        if self.steps_taken() != calm.steps_taken():
            self.problems.append(f"other losses or fingerprints: {sorted(self.steps_taken() ^ calm.steps_taken())[:4]}")
        if self.accuracies() != calm.accuracies():
            self.problems.append(f"other accuracies: {sorted(self.accuracies() ^ calm.accuracies())[:4]}")
