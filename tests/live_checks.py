"""What ranks do for test_live.py: real runs that are watched, traced and logged to trackers."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_checks import fit, fit_in_two

from oat_dist.engine import start_engine
from oat_dist.errors import OatError
from oat_dist.run_summary import finish_run

SHORT = ("batch_size=144", "epochs=2", "eval.every_epochs=1", "log.every_steps=2", "anchor.scope=device")
STOP = 13  # of 2 x 10 steps: inside the OAT epoch, after a line of the log
WATCHED = ("log.trackers=tensorboard", "log.project=watched", "log.profile_steps=9-12", "log.profile_all_ranks=true")
COLUMNS = 80


def runs(root_text: str, data: str) -> dict[str, Any]:
    """The same run bare, watched, and watched and interrupted; then others that are refused."""
    root, engine = Path(root_text), start_engine(threads=1)
    fit(engine, root, data, "bare", *SHORT)
    watched = fit(engine, root, data, "watched", *SHORT, *WATCHED)
    fit_in_two(engine, root, data, "resumed", STOP, *SHORT, *WATCHED)
    found: dict[str, Any] = {"world": engine.world.size, "step": watched.step}
    if engine.world.is_main:
        found["scalars"] = {name: scalars(root / name) for name in ("watched", "resumed")}
        (root / "blocked" / "trackers").mkdir(parents=True)
        (root / "blocked" / "trackers" / "watched").write_text("in the way")
    engine.world.all_agree(True)
    for name, overrides in (("blocked", WATCHED), ("beyond", ("log.profile_steps=19-21",))):
        try:
            fit(engine, root, data, name, *SHORT, *overrides)
        except OatError as error:
            found[name] = str(error)
    engine.close()
    return found


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve, as TensorBoard shows them."""
    curves = EventAccumulator(str(run / "trackers" / "watched"))
    curves.Reload()
    return {name: [(one.step, one.value) for one in curves.Scalars(name)] for name in curves.Tags()["scalars"]}


def on_a_terminal(root: str, data: str) -> dict[str, Any]:
    """A run whose stderr is a terminal: what was drawn, what was printed at its end, and at that of another start."""
    engine = start_engine(threads=1)
    with terminal() as drawn:
        few = ("eval.batch_size=1", "checkpoint.every_epochs=0", "log.every_steps=4")
        trainer = fit(engine, Path(root), data, "drawn", *SHORT, *few)
    printed = [said(trainer)]
    trainer = fit(engine, Path(root), data, "drawn", *SHORT, *few)
    printed.append(said(trainer))
    engine.close()
    return {"drawn": drawn[0], "printed": printed}


def said(trainer: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        finish_run(trainer)
    return stdout.getvalue()


@contextlib.contextmanager
def terminal() -> Iterator[list[str]]:
    """Make stderr a terminal for the block; the list has what was written to it afterwards."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    before = os.dup(2)
    os.dup2(slave, 2)
    os.environ["TERM"] = "xterm-256color"
    received, parts = [], []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(master, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield received
    finally:
        os.dup2(before, 2)
        os.close(slave)
        os.close(before)
        reader.join()
        os.close(master)
        received.append(b"".join(parts).decode())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
