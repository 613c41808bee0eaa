"""What ranks do for test_stopping.py, test_watchdog.py and test_ranks_change.py."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from training_checks import BASE, fit

from oat_dist.config import load_config
from oat_dist.distributed import counts
from oat_dist.engine import Engine, start_engine
from oat_dist.pulse import Pulse
from oat_dist.stopping import StopRequests
from oat_dist.train import main
from oat_dist.trainer import Trainer
from oat_dist.watchdog import Watchdog


def build(engine: Engine, root: Path, data: str, name: str, pulse: Pulse, *overrides: str) -> Trainer:
    if engine.world.is_main:
        (root / "base.yaml").write_text(BASE)
    engine.world.all_agree(True)
    config = load_config(root / "base.yaml", [f"output_dir={root / name}", f"data.path={data}", *overrides])
    return Trainer(config, engine, pulse)


def hang(root: str, data: str) -> None:
    """Rank 1 stands still in its fifth step."""
    engine = start_engine(threads=1)
    watchdog = Watchdog(3.0, engine.world.rank, grace=2.0)
    with watchdog.watching():
        trainer = build(engine, Path(root), data, "hung", Pulse(engine.world, None, watchdog))
        step = trainer.train_step

        def never_ends(window: Any) -> Any:
            if trainer.step == 4:
                time.sleep(3600)
            return step(window)

        if engine.world.rank == 1:
            trainer.train_step = never_ends  # type: ignore[method-assign]
        trainer.fit()


def cut_short(root_text: str, data: str) -> dict[str, Any]:
    """Asked to stop in the midst of an evaluation; then the same command again, and a run that nobody disturbs."""
    engine, root = start_engine(threads=1), Path(root_text)
    few = ("epochs=2", "eval.every_epochs=1", "eval.batch_size=1")
    whole = fit(engine, root, data, "whole", *few)
    stop_file = root / "stop"
    pulse = Pulse(engine.world, StopRequests((), stop_file), None, seconds=1e-6)
    trainer = build(engine, root, data, "cut", pulse, *few)

    def ask() -> None:
        while not trainer.validation.due:
            time.sleep(0.0005)
        stop_file.touch()

    asker = threading.Thread(target=ask)
    asker.start()
    trainer.fit()
    asker.join()
    stopped = {"step": trainer.step, "finished": trainer.finished, "why": pulse.stopping}
    engine.world.all_agree(True)
    state = json.loads((root / "cut" / "checkpoints" / f"step-{trainer.step}" / "state.json").read_text())
    resumed = build(engine, root, data, "cut", Pulse(engine.world), *few)
    resumed.fit()
    engine.close()
    return {
        "stopped": stopped,
        "owed": state["evaluation_due"],
        "best": [whole.validation.best, resumed.validation.best],
        "finished": resumed.finished,
    }


def beats(number: int, seconds: float) -> tuple[int, float]:
    """How often ranks agree while they take `number` short steps, and how long that took."""
    engine = start_engine(threads=1)
    pulse = Pulse(engine.world, seconds=seconds)
    counts.clear()
    started = time.monotonic()
    for _ in range(number):
        assert not pulse.beat("testing")
    engine.world.all_agree(True)
    found = counts["maximum"], time.monotonic() - started
    engine.close()
    return found


def until(root_text: str, data: str, name: str, stop: int, *overrides: str) -> None:
    """Some steps of a run with a global batch that most numbers of ranks do not divide."""
    engine = start_engine(threads=1)
    fit(
        engine,
        Path(root_text),
        data,
        name,
        *("batch_size=47", "anchor.scope=global", "pretrain_epochs=0", "log.every_steps=1", f"max_steps={stop}"),
        *overrides,
    )
    engine.close()


def command(*arguments: str) -> int:
    """The training command, in this process."""
    return main(list(arguments))
