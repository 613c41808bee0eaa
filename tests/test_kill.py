"""kill -9 at random moments, ten times, half of them in the middle of a save: the run always resumes, and ends with
exactly the weights of a run that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import HERE, single_environment
from training_checks import BASE

from oat_dist.checkpoint import find_checkpoint
from oat_dist.data.index import ShardSet

STEPS = 60


class Trainings:
    """Real training processes, one at a time, forked from a process that has done the imports."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "kill_server.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=single_environment(),
            )

    def start(self, *arguments: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(arguments) + "\n")
        self.process.stdin.flush()
        return int(self._answer("started"))

    def ended(self) -> int:
        return int(self._answer("ended"))

    def _answer(self, kind: str) -> str:
        assert self.process.stdout is not None
        word, _, value = self.process.stdout.readline().partition(" ")
        assert word == kind
        return value

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture
def trainings(tmp_path: Path) -> Iterator[Trainings]:
    server = Trainings(tmp_path / "stderr")
    yield server
    server.close()


def weights(run: Path) -> bytes:
    return (find_checkpoint(run).folder / "model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float, str]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["fingerprint"]) for line in lines if "loss" in line]


def test_a_run_killed_ten_times_always_resumes(
    trainings: Trainings, tmp_path: Path, digits: dict[str, ShardSet]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(BASE)
    common = [
        str(config),
        f"data.path={digits['train'].folder.parent}",
        f"max_steps={STEPS}",
        "checkpoint.every_steps=1",
        "eval.every_epochs=0",
    ]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    shared_memory = set(Path("/dev/shm").iterdir())
    trainings.start(*common, f"output_dir={calm}")
    assert trainings.ended() == 0

    chance = random.Random(2024)
    checkpoints = killed / "checkpoints"
    in_save = 0
    steps = [0]
    for attempt in range(10):
        # the cache on disk is killed in the midst of its use, too
        cache = ("data.decoded_cache=disk", f"data.cache_dir={tmp_path / 'cache'}")
        pid = trainings.start(*common, *cache, f"output_dir={killed}")
        # until it saves again, so that every attempt gets somewhere; then a little longer
        target = steps[-1] + chance.randint(1, 4)
        _wait_for(lambda until=target: _saved(checkpoints, until))
        if attempt % 2:
            _wait_for(lambda: bool(list(checkpoints.glob(".tmp-*"))))
        else:
            time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert trainings.ended() == -signal.SIGKILL
        in_save += bool(list(checkpoints.glob(".tmp-*")))
        steps.append(find_checkpoint(killed).step)
        assert steps[-1] >= target
    assert in_save >= 3, "hardly any kill fell into a save; the test is too weak"
    assert steps == sorted(steps) and steps[-1] < STEPS

    assert set(Path("/dev/shm").iterdir()) == shared_memory, "a killed run has left named shared memory behind"
    trainings.start(*common, f"output_dir={killed}")
    assert trainings.ended() == 0
    assert find_checkpoint(killed).step == STEPS
    assert not list((killed / "checkpoints").glob(".tmp-*"))
    assert weights(killed) == weights(calm)
    # one line a step; steps that were trained again took the same samples to the same loss
    expected, found = (losses(run) for run in (calm, killed))
    assert len(expected) == STEPS
    assert set(found) == set(expected)
    assert len(found) > STEPS, "no kill fell between a step and its save; the test is too weak"


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the training stands still"
        time.sleep(0.0005)


def _saved(checkpoints: Path, step: int) -> bool:
    return any(int(path.name.removeprefix("step-")) >= step for path in checkpoints.glob("step-*"))
