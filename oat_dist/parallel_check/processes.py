"""Start the processes of one stage on this machine, wait for them, and leave none behind.

Each gets what torchrun would set. A process whose standard input closes ends itself: so they all go when we do, even
when we are killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oat_dist.errors import LaunchError, OatError

__all__ = ["REFERENCE", "Stage", "run_stage"]

REFERENCE = "reference"
_GRACE_SECONDS = 2.0  # in which the rank that knows the reason can say it
_SECOND_HAND = "another rank has stopped"
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")


@dataclass(frozen=True)
class Stage:
    """Processes that run together: the reference, or the ranks of one engine.

    `deepspeed` is a JSON file; `controls` says whether the negative controls are run, too.
    """

    name: str
    engine: str
    processes: int
    deepspeed: str | None = None
    controls: bool = False


def run_stage(stage: Stage, folder: Path, cpu: bool, deadline: float) -> list[dict[str, Any]]:
    """Run a stage to its end; what each rank found.

    Args:
        deadline: of `time.monotonic`.

    Raises:
        OatError: a rank's own words.
        LaunchError: a rank that ended without any, or did not end in time.
    """
    values = {"engine": stage.engine, "processes": stage.processes, "deepspeed": stage.deepspeed}
    (folder / f"stage-{stage.name}.json").write_text(json.dumps({**values, "controls": stage.controls}))
    logs = [folder / f"{stage.name}-{rank}.log" for rank in range(stage.processes)]
    port = _free_port()
    running = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "oat_dist.parallel_check", str(folder), stage.name],
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=output,
                        env=_environment(rank, stage.processes, port, cpu),
                        start_new_session=True,
                    )
                )
        failed = _wait(running, deadline)
    finally:
        for process in running:
            _end(process)
    if failed is None:
        raise LaunchError(
            f"{stage.name}: {stage.processes} process(es) have not finished in time; allow more with --timeout-minutes"
        )
    if failed:
        raise _reason(stage.name, [(rank, running[rank].returncode, logs[rank].read_text()) for rank in failed])
    if stage.name == REFERENCE:
        return [json.loads((folder / f"{REFERENCE}.json").read_text())]
    return [json.loads((folder / f"{stage.name}-{rank}.json").read_text()) for rank in range(stage.processes)]


def _wait(running: list[subprocess.Popen[bytes]], deadline: float) -> list[int] | None:
    """The ranks that failed, in the order in which they did; None: time is up."""
    failed: list[int] = []
    ends = deadline
    while True:
        states = [process.poll() for process in running]
        failed += [rank for rank, state in enumerate(states) if state not in (None, 0) and rank not in failed]
        if None not in states:
            return failed
        if failed and ends == deadline:
            ends = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > ends:
            return failed or None
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _reason(name: str, failed: list[tuple[int, int, str]]) -> OatError:
    """The error line of the first rank that has one of its own."""
    told = [
        line.removeprefix("error: ") for _, _, log in failed for line in log.splitlines() if line.startswith("error: ")
    ]
    told.sort(key=lambda line: _SECOND_HAND in line)
    if told:
        return OatError(told[0])
    rank, code, log = failed[0]
    if code < 0:
        hint = "; out of memory? a smaller batch_size=... will do for the check" if code == -signal.SIGKILL else ""
        return LaunchError(f"{name}: rank {rank} was ended by {signal.Signals(-code).name}{hint}")
    last = (log.strip().splitlines() or ["no output"])[-1]
    print(log, file=sys.stderr)  # a defect, not bad input: all of it is wanted
    return LaunchError(f"{name}: rank {rank} ended with status {code}: {last}")


def _environment(rank: int, world: int, port: int, cpu: bool) -> dict[str, str]:
    """What a launcher sets, and nothing that another one has left: our stages say which engine and precision it is."""
    values = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    if cpu:
        values |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if world > 1:
        values |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
