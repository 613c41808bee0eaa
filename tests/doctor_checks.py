"""What each rank does for test_doctor.py: walks of the doctor over healthy and broken set-ups, on real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
from pathlib import Path
from typing import Any

import torch

from oat_dist.commands import doctor as command
from oat_dist.config import load_config
from oat_dist.doctor import Options, network, practice, run, signals, wire
from oat_dist.doctor.launch import Launch
from oat_dist.doctor.looks import attempt
from oat_dist.doctor.walk import Walk
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import OatError
from oat_dist.files import folder_lock

Rows = list[dict[str, str]]


def walk(engine: Engine, config_file: str, overrides: list[str], **options: Any) -> Rows:
    """All checks that need every rank; the rows, on rank 0."""
    config = load_config(config_file, overrides)
    one = Walk(config, Options(**options), lambda rows, processes: None, attempt(signals.look, config))
    one.engine, one.world = engine, engine.world
    with one.workspace():
        one.together(Launch.read())
    return [dataclasses.asdict(row) for row in one.rows]


def campaign(root_text: str, config: str, data: str, damaged: str, missing: str, other: str) -> dict[str, Rows]:
    """Many walks in one set of processes; each provokes one failure."""
    root = Path(root_text)
    engine = start_engine(threads=1)
    rank, found = engine.world.rank, {}

    def go(name: str, *overrides: str, **options: Any) -> None:
        engine.world.all_agree(True)
        given = {"training": False, "quick": True, **options}
        found[name] = walk(engine, config, [f"output_dir={root / name}", f"data.path={data}", *overrides], **given)

    go("healthy", quick=False, training=True)
    network._LARGE = network._SMALL  # measured once is enough
    go("small", "checkpoint.keep=1000000000", training=True, grace=0.001)
    go("tight", "job.check_seconds=60", training=True, grace=100.0)
    go("no weights", f"model.weights={root / 'none.safetensors'}", training=True)
    go("damaged", f"data.path={damaged}", quick=False)
    go("damaged, quick", f"data.path={damaged}")
    go("missing", f"data.path={missing}")
    go("not there on rank 1", f"data.path={data if rank == 0 else root / 'nowhere'}", quick=False)
    go("another set on rank 1", f"data.path={data if rank == 0 else other}", quick=False)
    go("output_dir of each", f"output_dir={root / f'own-{rank}'}", training=True)
    (root / "file").touch()
    go("output_dir is none", f"output_dir={root / 'file'}", training=True)
    urls = f"{data}/train/train-{{000000..000002}}.tar"
    go("stream", "data.mode=stream", f"data.stream.urls={urls}", "data.stream.samples=1000", training=True)
    if rank == 0:
        with folder_lock(root / "held", "busy"):
            go("held")
            go("held", "job.take_over=true")
            found["taken over"] = found.pop("held")
            go("held")
    else:
        for _ in range(3):
            go("held")
        found["taken over"] = []
    engine.close()
    return found


def tmpfs(config: str, data: str, output_dir: str) -> Rows:
    """A disk on which no checkpoint fits."""
    engine = start_engine(threads=1)
    rows = walk(engine, config, [f"output_dir={output_dir}", f"data.path={data}"], quick=True)
    engine.close()
    return rows


def remote(config: str, url: str, overrides: list[str]) -> Rows:
    engine = start_engine(threads=1)
    rows = walk(engine, config, [f"data.path={url}", *overrides], training=False)
    engine.close()
    return rows


def main(arguments: list[str], environment: dict[str, str | None], ignored: list[int], blocked: list[int]) -> Any:
    """The command as a user starts it: status, stdout, stderr. `ignored` and `blocked` are signals of rank 1."""
    before = dict(os.environ)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if os.environ.get("RANK", "1") == "1":
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    run._GRACE_SECONDS = 0.5
    signals._STOP_SECONDS = 2.0
    signals._HEARD_SECONDS = 1.0
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = command.main(arguments)
    os.environ.clear()
    os.environ.update(before)  # by which the server of ranks knows this one
    return [status, said.getvalue(), errors.getvalue()]


def terminated(arguments: list[str]) -> int | str | None:
    """Slurm's SIGTERM comes in the middle of the practice; the exit status."""
    practice.practise = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    try:
        return command.main(arguments)
    except SystemExit as ended:
        return ended.code


def break_off(arguments: list[str], how: str, folder: str) -> None:
    """Rank 1 breaks off in the practice (out of memory: all do).

    What each rank prints, and how it ends, goes to files of `folder`.
    """
    rank, real_exit = os.environ["RANK"], os._exit

    def note(status: int) -> None:
        Path(folder, f"said-{rank}").write_text(said.getvalue())
        Path(folder, f"status-{rank}").write_text(str(status))
        real_exit(0)

    def fail(*_: Any) -> None:
        if how == "dies":
            real_exit(0)
        raise OatError("the disk of this node is gone; mend it")

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    os._exit = note
    wire._STUCK_SECONDS = 1.0
    if how == "memory":
        practice._TimedTrainer.train_step = out_of_memory
    elif rank == "1":
        practice.practise = fail
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        note(command.main(arguments))
