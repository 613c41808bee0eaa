"""The faults of the campaign. Each starts the run once (a zombie: twice), does its harm at a random moment, and looks
at what must hold afterwards; what does not is written into ``run.problems``."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign_run import Run, Start

Fault = Callable[[Run, random.Random], None]
DISK = 24 * 2**20  # bytes of the small disk that is filled


def moment(run: Run, start: Start, chance: random.Random, *, starting: bool = True) -> None:
    """Wait for a random moment: while it starts, some steps on, in the midst of a save, or of an evaluation."""
    kind = chance.choices(("starting", "step", "save", "evaluation"), (int(starting), 4, 3, 2))[0]
    here = run.step()
    if kind == "starting":
        time.sleep(chance.uniform(0, 1.5))
    elif kind == "step":
        target = here + chance.randint(1, 12)
        start.wait(lambda: run.step() >= target, f"step {target}")
        time.sleep(chance.uniform(0, 0.02))
    elif kind == "save":
        start.wait(lambda: run.step() > here, "a step")
        start.wait(lambda: bool(list(run.checkpoints.glob(".tmp-*"))), "a save")
        time.sleep(chance.uniform(0, 0.01))
    else:
        target = (here // 31 + 1) * 31  # 1,438 samples in batches of 47: an epoch
        start.wait(lambda: run.step() >= target, f"step {target}")
        time.sleep(chance.uniform(0, 0.1))


def some_rank(run: Run, chance: random.Random) -> int:
    return chance.randrange(run.case.world)


def rank_dies(run: Run, chance: random.Random) -> None:
    """kill -9 of one rank: once they are together the others must end by themselves; before, the launcher ends them."""
    here, before, start = run.step(), run.newest(), run.start()
    moment(run, start, chance)
    together = run.step() > here
    start.send(signal.SIGKILL, some_rank(run, chance))
    start.end(patience=30 if together else 3)
    if start.left and together:
        run.problems.append(f"start {run.starts}: {len(start.left)} rank(s) did not notice that another had died")
    run.check_resume(before, start)


def node_dies(run: Run, chance: random.Random) -> None:
    """kill -9 of all ranks at once."""
    before, start = run.newest(), run.start()
    moment(run, start, chance)
    start.kill()
    run.check_resume(before, start)


def rank_hangs(run: Run, chance: random.Random) -> None:
    """SIGSTOP of one rank: the others must say where they wait, and end."""
    before, start = run.newest(), run.start("engine.timeout_minutes=0.1")
    target = run.step() + chance.randint(1, 12)
    if not start.wait(lambda: run.step() >= target, f"step {target}"):
        run.check_resume(before, start)
        rank_hangs(run, chance)  # so slow a machine that starting was taken for a hang: once more
        return
    stopped = some_rank(run, chance)
    start.send(signal.SIGSTOP, stopped)
    start.end()
    watching = [rank for rank in range(run.case.world) if rank != stopped]
    for rank in watching:
        told = f"[rank {rank}] error: no sign of life" in start.said()
        if not (told and "most recent call first" in start.said()):
            run.problems.append(f"start {run.starts}: rank {rank} hung without a word:\n{start.said()}")
    run.check_resume(before, start)


def stop(run: Run, chance: random.Random) -> None:
    """A signal to one rank, or the stop file: all ranks must save and end with status 0."""
    before, start = run.newest(), run.start()
    moment(run, start, chance, starting=False)
    how = chance.choice(("USR1", "TERM", "INT", "file"))
    if how == "file":
        start.stop_file.touch()
    else:
        start.send(signal.Signals[f"SIG{how}"], some_rank(run, chance))
    start.wait(lambda: False, "all ranks end")
    if any(start.codes.values()) or start.outcome() not in ("stopped", "finished"):
        codes = list(start.codes.values())
        run.problems.append(f"start {run.starts}: asked to stop ({how}), it ended with {codes}:\n{start.said()}")
    elif run.newest() < run.step():
        run.problems.append(f"start {run.starts}: stopped after step {run.step()}, but saved {run.newest()}")
    run.check_resume(before, start)


def stop_cut_short(run: Run, chance: random.Random) -> None:
    """A request to stop, and kill -9 before the grace period is over."""
    before, start = run.newest(), run.start()
    moment(run, start, chance)
    start.stop_file.touch()
    time.sleep(chance.uniform(0, 0.3))
    start.kill()
    run.check_resume(before, start)


def disk_full(run: Run, chance: random.Random) -> None:
    """No space left, on a real file system: the save must fail on all ranks in one line, and leave the older ones."""
    before, start = run.newest(), run.start()
    moment(run, start, chance)
    filler = run.folder.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:  # until it is full
        while True:
            file.write(bytes(2**20))
            file.flush()
    start.end(patience=3)
    whole = run.newest()
    filler.unlink()
    if start.outcome() != "finished" and not ("No space left" in start.said() and "error: " in start.said()):
        run.problems.append(f"start {run.starts}: a full disk was not named:\n{start.said()}")
    if whole < before:
        run.problems.append(f"start {run.starts}: a full disk cost the checkpoint of step {before}")
    run.check_resume(before, start)


def checkpoint_damaged(run: Run, chance: random.Random) -> None:
    """A byte flipped, a file cut short or gone, in the newest checkpoint: it must be named, and the one before used."""
    if len(_saved(run)) < 2:  # never all there is: first let it save once more
        before, start = run.newest(), run.start()
        start.wait(lambda: len(_saved(run)) > 1, "two checkpoints")
        start.kill()
        run.check_resume(before, start)
    steps = _saved(run)
    folder = run.checkpoints / f"step-{steps[-1]}"
    path = chance.choice(sorted(folder.iterdir()))
    how = chance.choice(("flip", "cut", "gone"))
    if how == "gone" or path.stat().st_size == 0:
        path.unlink()
    elif how == "cut":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif path.name == "manifest.json":  # a flipped byte may leave it valid
        path.write_text("{}")
    else:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    before = run.newest()
    assert before == steps[-2], "the damage has not been done"
    start = run.start()
    start.wait(lambda: run.step() > steps[-1], "it has made up for it")
    start.kill()
    named = f"{folder / path.name} is" in start.said()
    if start.outcome() and not ("passed over a checkpoint" in start.said() and named):
        run.problems.append(f"start {run.starts}: damage of {path.name} ({how}) was not named:\n{start.said()}")
    run.check_resume(before, start)


def _saved(run: Run) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*"))


def zombie(run: Run, chance: random.Random) -> None:
    """All ranks stopped, a new start takes over, and in the midst of it the old ranks wake up."""
    before, old = run.newest(), run.start()
    moment(run, old, chance, starting=False)  # what has not begun is no zombie: it would go on from what there is
    old.send(signal.SIGSTOP)
    run.check_resume(before, old)
    before = run.newest()
    new = run.start("job.take_over=true")
    target = run.step() + chance.randint(1, 10)
    new.wait(lambda: new.outcome() == "running" and run.step() >= target, "the new start trains")
    old.send(signal.SIGCONT)
    target = run.step() + chance.randint(1, 20)
    new.wait(lambda: run.step() >= target, "the new start trains on")
    new.stop_file.touch()
    new.wait(lambda: False, "the new start ends")
    old.wait(lambda: False, "the zombie ends")
    if old.outcome() == "running" and not any(code == 2 for code in old.codes.values()):
        run.problems.append(f"the zombie ended with {list(old.codes.values())}:\n{old.said()}")
    if any(new.codes.values()):
        run.problems.append(f"the zombie broke the new start: {list(new.codes.values())}:\n{new.said()}")
    elif run.newest() < run.step():
        run.problems.append(f"the zombie cost a checkpoint: {run.newest()} is newest after step {run.step()}")
    run.check_resume(before, new)


FAULTS: dict[str, Fault] = {
    "a rank dies": rank_dies,
    "all ranks die": node_dies,
    "a rank hangs": rank_hangs,
    "asked to stop": stop,
    "stop, grace too short": stop_cut_short,
    "disk full": disk_full,
    "checkpoint damaged": checkpoint_damaged,
    "zombie": zombie,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for `folder`, small enough to be filled. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "oat-campaign", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
