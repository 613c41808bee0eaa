"""Start N real gloo processes once and run a function in each: ``run_ranks(2, "module:function", arguments)``.

The function gets the arguments (JSON values) and returns JSON values; it runs on every rank at once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank on this machine, without GPUs."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }


def start(command: list[str], world: int, **options: Any) -> list[subprocess.Popen[str]]:
    """Start `command` once a rank, each in a session of its own so that `stop` can end all it started."""
    port = free_port()
    return [
        subprocess.Popen(
            command,
            env=rank_environment(rank, world, port) if world > 1 else single_environment(),
            text=True,
            start_new_session=True,
            **options,
        )
        for rank in range(world)
    ]


def single_environment() -> dict[str, str]:
    """One process that no launcher started."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    plain = {key: value for key, value in rank_environment(0, 1, 0).items() if key not in names}
    return {**plain, "ACCELERATE_USE_CPU": "true"}


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(world: int, target: str, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Run ``module:function(*arguments)`` on `world` ranks and return their results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "ranks.py"), target, json.dumps(arguments), folder]
        with Path(folder, "stderr").open("w") as stderr:
            processes = start(command, world, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            deadline = time.monotonic() + timeout
            while any(process.poll() is None for process in processes):
                if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
                    time.sleep(1.0)  # let the others say what they saw
                    break
                time.sleep(0.05)
        finally:
            stop(processes)
        if any(process.returncode != 0 for process in processes):
            codes = [process.returncode for process in processes]
            raise AssertionError(f"{target} on {world} ranks ended with {codes}:\n{Path(folder, 'stderr').read_text()}")
        return [json.loads(Path(folder, f"result-{rank}.json").read_text()) for rank in range(world)]


def _main() -> None:
    target, arguments, folder = sys.argv[1:]
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(folder, f"result-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
