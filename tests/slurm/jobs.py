"""A user's desk: a folder with a config and a site file, from where the scripts of launch/slurm/ are submitted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import MiniCluster
from ranks import HERE
from training_checks import BASE

__all__ = ["Campaign", "Desk", "Scenario"]

TOP = HERE.parent
SCRIPTS = TOP / "launch" / "slurm"
_AT_ONCE = 4


@dataclass
class Desk:
    """Where the jobs of one scenario come from, and what they leave. `nodes` are the ones it works on."""

    cluster: MiniCluster
    folder: Path
    data: Path
    nodes: tuple[str, ...]
    underway: threading.Event
    submitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.config = self.folder / "config.yaml"
        # Without an end of its own: a scenario says where it is (`end_at`) when it has done its worst.
        config = BASE
        for before, after in (
            ("batch_size: 48", "batch_size: 12"),
            ("\nepochs: 3", "\nepochs: 100000"),
            ("pretrain_epochs: 1", "pretrain_epochs: 0"),
            ("{keep: 2}", "{keep: 2, every_steps: 10}"),
            ("{every_epochs: 2}", "{every_epochs: 0}"),
            ("{every_steps: 8}", "{every_steps: 1}"),
        ):
            assert before in config
            config = config.replace(before, after, 1)
        self.config.write_text(config + "job: {check_seconds: 0.2}\n")
        self.site = self.folder / "site.sh"
        self.say(f"source {Path(sys.executable).parent}/activate")
        self.say("export GLOO_SOCKET_IFNAME=lo ACCELERATE_USE_CPU=true")

    def submit(self, script: str, *arguments: str, nodes: int = 2, options: tuple[str, ...] = (), **more: str) -> str:
        """Submit one of our scripts, one rank with one core on each of `nodes` nodes; the job's id."""
        job = self.cluster.submit(
            SCRIPTS / f"{script}.sbatch",
            *arguments,
            options=(
                *(f"--chdir={TOP}", f"--output={self.folder}/%x-%A_%a.log", "--cpus-per-task=1"),
                *(f"--nodes={nodes}", f"--nodelist={','.join(self.nodes[:nodes])}", *options),
            ),
            OAT_SITE=str(self.site),
            OAT_JOBS=str(self.folder / "jobs"),
            **more,
        )
        self.submitted.append(job)
        return job

    def command(self, *arguments: str) -> str:
        """What an `oat-dist` command says that submits jobs by itself."""
        done = subprocess.run(
            [sys.executable, "-m", "oat_dist.cli", *arguments],
            cwd=TOP,
            env={**self.cluster.environment, "OAT_SITE": str(self.site), "OAT_JOBS": str(self.folder / "jobs")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def say(self, line: str) -> None:
        """One more line in the site file, which every attempt reads."""
        with self.site.open("a") as file:
            file.write(f"{line}\n")

    def end_at(self, step: int) -> None:
        """From their next attempt on, trainings end there."""
        with self.config.open("a") as file:
            file.write(f"max_steps: {step}\n")

    def log(self, job: str) -> str:
        number, _, task = job.partition("_")
        return "".join(path.read_text() for path in self.folder.glob(f"*-{number}_{task or '*'}.log"))

    def decisions(self, job: str) -> list[str]:
        """What the script has said it does next, attempt by attempt."""
        said = re.findall(r"attempt \d+: .*", self.log(job))
        return [line for line in said if re.search(" meeting at | asked to stop ", line) is None]

    def wait_log(self, job: str, text: str) -> None:
        self.cluster.until(lambda: re.search(text, self.log(job)), f"log of job {job}: {text}")

    def lines(self, run: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        try:
            text = (self.folder / run / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self, run: str) -> int:
        return max((line.get("step", 0) for line in self.lines(run)), default=0)

    def wait_steps(self, run: str, steps: int, starts: int = 1) -> None:
        """Wait until the run was started (or resumed) so many times and has taken so many steps since then."""

        def there() -> bool:
            begun = [number for number, line in enumerate(self.lines(run)) if line.get("event") in ("start", "resume")]
            return len(begun) >= starts and sum("loss" in line for line in self.lines(run)[begun[-1] :]) >= steps

        self.cluster.until(there, f"{steps} steps of {run} after {starts} starts")

    def weights(self, run: str) -> bytes:
        checkpoints = self.folder / run / "checkpoints"
        return (checkpoints / (checkpoints / "latest").read_text().strip() / "model.safetensors").read_bytes()

    def losses(self, run: str) -> set[tuple[int, float, str]]:
        return {(line["step"], line["loss"], line["fingerprint"]) for line in self.lines(run) if "loss" in line}


Scenario = Callable[[Desk], None]


class Campaign:
    """Scenarios that happen at the same time on one cluster: much of their time is waiting.

    The first one has the machine to itself until it sets `Desk.underway`, or ends.
    """

    def __init__(
        self, cluster: MiniCluster, folder: Path, data: Path, scenarios: dict[Scenario, tuple[str, ...]]
    ) -> None:
        self._cluster, self._underway = cluster, threading.Event()
        self._threads = ThreadPoolExecutor(_AT_ONCE)
        self._running: dict[Scenario, Future[None]] = {}
        for scenario, nodes in scenarios.items():
            desk = Desk(cluster, folder / scenario.__name__, data, nodes, self._underway)
            self._running[scenario] = self._threads.submit(self._play, scenario, desk, first=not self._running)

    def result(self, scenario: Scenario) -> None:
        """Wait for a scenario, and raise what went wrong in it."""
        self._running[scenario].result()

    def close(self) -> None:
        """Once the cluster has stopped, which ends every wait."""
        self._threads.shutdown()

    def _play(self, scenario: Scenario, desk: Desk, *, first: bool) -> None:
        try:
            if not first:
                self._cluster.until(self._underway.is_set, "the first scenario is under way")
            scenario(desk)
        except Exception as error:
            logs = "\n".join(f"== job {job}\n{desk.log(job)[-6000:]}" for job in desk.submitted)
            raise AssertionError(f"{type(error).__name__}: {error}\n{logs}") from error
        finally:
            if first:
                self._underway.set()
