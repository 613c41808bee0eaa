"""Trains the runs of a plan on this machine, so many at a time, each in a process of its own.

A run is the command that trains it by hand: what was interrupted goes on, what fails does not stop the others. Asked to
stop, it passes that on once (SIGTERM: a training saves and ends) and waits. Children lead sessions of their own: a
Ctrl-C of the terminal reaches them through here alone, since hearing it twice would end them without saving.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from oat_dist.errors import OatError
from oat_dist.experiments.plan import PlannedRun
from oat_dist.experiments.progress import Progress
from oat_dist.experiments.run_state import is_busy, outcome_of, trained_state
from oat_dist.stopping import StopRequests

__all__ = ["Child", "Machine", "Pool", "start_process", "training_command"]

LOG_NAME = "train.log"
STARTS_NAME = "starts.jsonl"
_PAUSE = 0.2  # seconds between looks
_DIVERGED = "diverged"


class Child(Protocol):
    """A process, as `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...


def start_process(command: Sequence[str], environment: dict[str, str], log: Path) -> Child:
    """Start a training whose output is appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


@dataclass(frozen=True)
class Machine:
    """How runs share this machine.

    Attributes:
        jobs: how many at a time.
        gpus: one of these for each, by CUDA_VISIBLE_DEVICES; empty: none are dealt out.
        launch: what stands before ``-m oat_dist.train``.
        one_thread: on the CPU each has one, so that numbers do not depend on `jobs`.
    """

    jobs: int
    gpus: tuple[str, ...] = ()
    launch: tuple[str, ...] = (sys.executable,)
    one_thread: bool = True

    def environment(self, slot: int) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return {**os.environ, **({"OMP_NUM_THREADS": "1"} if self.one_thread else {}), **own}


def training_command(run: PlannedRun, launch: Sequence[str]) -> list[str]:
    """The command that trains a run, or takes it up again."""
    return [*launch, "-m", "oat_dist.train", str(run.config_path), *run.overrides]


@dataclass
class Pool:
    """
    Args:
        judge: is called with each trained run, in this process; may raise OatError.
        diverged: is called with a run whose training ended in numbers that are not finite, and what it said.

    Attributes:
        problems: why which run has failed, by folder; of one that has diverged, that word.
    """

    machine: Machine
    requests: StopRequests
    progress: Progress
    judge: Callable[[PlannedRun, int | None], None]
    diverged: Callable[[PlannedRun, str], None]
    problems: dict[Path, str] = field(default_factory=dict)

    def train(self, runs: Sequence[PlannedRun]) -> None:
        """Train and judge `runs`, parents before their children; returns early when asked to stop."""
        waiting = list(runs)
        trained: list[PlannedRun] = []
        running: dict[int, tuple[PlannedRun, Child, int]] = {}
        passed_on = False
        while running or trained or (waiting and not passed_on):
            if self.requests.heard is not None and not passed_on:
                passed_on = True
                self.progress.say(f"stopping {len(running)} training(s), which save and end")
                for _, child, _ in running.values():
                    child.terminate()
            for slot, (run, child, before) in list(running.items()):
                code = child.poll()
                if code is not None:
                    del running[slot]
                    if self._ended(run, code, before, passed_on):
                        trained.append(run)
            while not passed_on and len(running) < self.machine.jobs:
                next_run = self._next(waiting, [run for run, _, _ in running.values()])
                if next_run is None:
                    break
                waiting.remove(next_run)
                if trained_state(next_run) is not None:
                    trained.append(next_run)
                else:
                    slot = next(number for number in range(self.machine.jobs) if number not in running)
                    running[slot] = self._begin(next_run, slot)
            self.progress.update([run for run, _, _ in running.values()])
            if passed_on:
                trained.clear()  # judged by the next call
            elif trained:
                self._judge(trained.pop(0))
                continue
            time.sleep(_PAUSE)

    def _next(self, waiting: list[PlannedRun], running: Sequence[PlannedRun]) -> PlannedRun | None:
        for run in list(waiting):
            parent = run.parent
            if parent is not None and parent.folder in self.problems:
                waiting.remove(run)
                if self.problems[parent.folder] == _DIVERGED:
                    self._diverge(run, f"{parent.name}, which it starts from, has diverged")
                else:
                    self._fail(run, f"{parent.name}, which it starts from, has not ended well")
            elif parent is not None and (parent in waiting or parent in running):
                continue
            elif is_busy(run):
                self.progress.once(f"{run.name}: another process is training in {run.folder}; waiting for it")
            else:
                return run
        return None

    def _begin(self, run: PlannedRun, slot: int) -> tuple[PlannedRun, Child, int]:
        run.folder.mkdir(parents=True, exist_ok=True)
        log, command = run.folder / LOG_NAME, training_command(run, self.machine.launch)
        (run.folder / "outcome").unlink(missing_ok=True)
        with (run.folder / STARTS_NAME).open("a") as file:
            file.write(json.dumps({"jobs": self.machine.jobs, "command": shlex.join(command)}) + "\n")
        before = log.stat().st_size if log.exists() else 0
        self.progress.began(run)
        child = start_process(
            [*command, f"job.outcome_file={run.folder / 'outcome'}"], self.machine.environment(slot), log
        )
        return run, child, before

    def _ended(self, run: PlannedRun, code: int, before: int, stopping: bool) -> bool:
        """Whether a run is trained, once its process has ended."""
        state = outcome_of(run)
        if code == 0 and trained_state(run) is not None:
            return True
        error = _last_error(run.folder / LOG_NAME, before)
        if state == "refused" and "not finite" in error:
            self._diverge(run, error)
        elif state == "stopped" and stopping:
            self.progress.ended(run, "stopped, saved")
        else:
            how = "stopped by a signal from elsewhere" if state == "stopped" else f"status {code}: {error}"
            self._fail(run, f"{how} ({run.folder / LOG_NAME})")
        return False

    def _judge(self, run: PlannedRun) -> None:
        try:
            self.judge(run, _most_jobs(run))
        except OatError as error:
            self._fail(run, str(error))
        else:
            self.progress.ended(run, "trained")

    def _diverge(self, run: PlannedRun, error: str) -> None:
        self.diverged(run, error)
        self.problems[run.folder] = _DIVERGED
        self.progress.ended(run, f"diverged: {error}")

    def _fail(self, run: PlannedRun, why: str) -> None:
        self.problems[run.folder] = why
        self.progress.ended(run, f"failed: {why}")


def _last_error(log: Path, before: int) -> str:
    """The last line of an error that a log has got since it had `before` bytes, or else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(before)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def _most_jobs(run: PlannedRun) -> int | None:
    """How many trainings, at most, its starts were told to share the machine with; None: not known."""
    try:
        lines = (run.folder / STARTS_NAME).read_text().splitlines()
        return max((json.loads(line)["jobs"] for line in lines), default=None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
