"""Start N real gloo processes once and run a function in each: ``run_ranks(2, "module:function", arguments)``.

The function gets the arguments (JSON values) and returns JSON values; it runs on every rank at once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
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


class RankServer:
    """Has imported the trainer once and forks every rank from there: an import costs more than most tests do."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py")],
            env=rank_environment(0, 2, 0),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def start(self, environment: dict[str, str], target: str, arguments: str, folder: str) -> int:
        """Fork one rank, in a session of its own; its process id."""
        return int(self._ask({"environment": environment, "run": [target, arguments, folder]}))

    def status(self, pid: int) -> int | None:
        """Its exit code, below zero for a signal; None while it runs."""
        return self._ask({"status": pid})

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the server of ranks has ended with {self._process.wait()}; what it said stands above"
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@functools.cache
def rank_server() -> RankServer:
    return RankServer()


def run_ranks(world: int, target: str, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Run ``module:function(*arguments)`` on `world` ranks and return their results by rank."""
    return [result for result, _ in heard_ranks(world, target, *arguments, timeout=timeout)]


def heard_ranks(world: int, target: str, *arguments: Any, timeout: float = 300) -> list[tuple[Any, str]]:
    """As `run_ranks`; by rank the result, and what it wrote to stderr."""
    server, port = rank_server(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        codes: dict[int, int | None] = {}
        for rank in range(world):
            environment = rank_environment(rank, world, port) if world > 1 else single_environment()
            codes[server.start(environment, target, json.dumps(arguments), folder)] = None
        deadline = time.monotonic() + timeout

        def look() -> None:
            codes.update({pid: server.status(pid) for pid, code in codes.items() if code is None})

        try:
            while None in codes.values():
                look()
                if time.monotonic() > deadline or any(codes.values()):
                    time.sleep(1.0)  # let the others say what they saw
                    break
                time.sleep(0.05)
        finally:
            look()
            for pid in [pid for pid, code in codes.items() if code is None]:
                os.killpg(pid, signal.SIGKILL)
            while None in codes.values():
                look()
        if any(codes.values()):
            overtime = f" (stopped after {timeout:g} s)" if time.monotonic() > deadline else ""
            said = "".join(path.read_text() for path in sorted(Path(folder).glob("stderr-*")))
            raise AssertionError(f"{target} on {world} ranks ended with {list(codes.values())}{overtime}:\n{said}")
        return [
            (json.loads(Path(folder, f"result-{rank}.json").read_text()), Path(folder, f"stderr-{rank}").read_text())
            for rank in range(world)
        ]


def _run(target: str, arguments: str, folder: str) -> None:
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(folder, f"result-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def _fork(answers: int, environment: dict[str, str], target: str, arguments: str, folder: str) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        os.read(reading, 1)  # it leads a session of its own by now, which can be killed as a whole
        os.close(reading)
        return pid
    code = 1
    try:
        os.setsid()
        os.close(answers)  # or nobody would notice when the server dies
        os.close(writing)
        os.close(reading)
        os.environ.clear()
        os.environ.update(environment)
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(f"{folder}/stderr-{environment.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT, 0o600)
        for number, descriptor in enumerate((null, null, said)):
            os.dup2(descriptor, number)
        _run(target, arguments, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _import_deepspeed() -> None:
    """Before the ranks that will use it are forked: in each of them it would take longer than most tests."""
    from oat_dist.engine.zero import import_deepspeed
    from oat_dist.errors import LaunchError

    with contextlib.suppress(LaunchError):  # not installed: they say so
        import_deepspeed(on_cpu=True)
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # looked for at every start


def _serve() -> None:
    """Answer questions on stdin until it ends; then end what still runs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed talks when it is imported

    import oat_dist.report
    import oat_dist.trainer  # noqa: F401  # what nearly every rank needs, to the report at its end

    running: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "run" in question:
            if "zero" in "".join(question["run"]):
                _import_deepspeed()
            pid = _fork(answers.fileno(), question["environment"], *question["run"])
            running[pid], answer = None, pid
        else:
            pid = question["status"]
            if running[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                running[pid] = os.waitstatus_to_exitcode(status) if ended else None
            answer = running[pid]
        print(json.dumps(answer), file=answers, flush=True)
    for pid in (pid for pid, code in running.items() if code is None):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
