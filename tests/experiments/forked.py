"""Trainings forked from a process that has imported the trainer: real ones, but for the seconds of an import."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ranks import rank_server, single_environment

__all__ = ["Forked", "start_forked", "train"]


@dataclass
class Forked:
    pid: int

    def poll(self) -> int | None:
        return rank_server().status(self.pid)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def start_forked(command: Sequence[str], environment: dict[str, str], log: Path) -> Forked:
    """In place of `oat_dist.experiments.pool.start_process`."""
    module = list(command).index("-m")
    assert command[module + 1] == "oat_dist.train"
    assert environment["OMP_NUM_THREADS"] == "1"
    arguments = json.dumps([list(command[module + 2 :]), str(log)])
    return Forked(
        rank_server().start(single_environment(), "experiments.forked:train", arguments, tempfile.gettempdir())
    )


def train(arguments: list[str], log: str) -> None:
    """In the forked process."""
    from oat_dist.train import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os._exit(main(arguments))
