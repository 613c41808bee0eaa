"""A few real steps and one real save of the run itself: does it train, and does a save fit into the grace period?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from oat_dist.batch import Window
from oat_dist.config import Config
from oat_dist.config_keys import JobConfig
from oat_dist.data.stream import StreamSet
from oat_dist.doctor.looks import Trouble
from oat_dist.doctor.rows import FAIL, PASS, WARN, Row, bytes_text
from oat_dist.doctor.shards import Opened
from oat_dist.engine import Engine
from oat_dist.models import build_model, freeze
from oat_dist.trainer import Trainer

__all__ = ["Trial", "checkpoint_bytes", "judge_grace", "judge_trial", "out_of_memory", "practice_config", "practise"]

STEPS = 3  # the first one is slower than the rest
_SAFETY = 2.0


@dataclass(frozen=True)
class Trial:
    """Seconds of a step and of a save on one rank, bytes of the checkpoint, and of the GPU's memory."""

    step: float
    save: float
    size: int
    peak: int = 0
    memory: int = 0


class _TimedTrainer(Trainer):
    """Notes when its steps end, and how long its save takes."""

    ended: tuple[float, ...] = ()
    save_seconds = 0.0

    def train_step(self, window: Window) -> torch.Tensor | None:
        norm = super().train_step(window)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.ended += (time.perf_counter(),)
        return norm

    def _save(self, best: bool) -> None:
        started = time.perf_counter()
        super()._save(best)
        self.save_seconds = time.perf_counter() - started


def practice_config(config: Config, folder: Path, opened: Opened) -> Config:
    """The same training into another folder: `STEPS` steps of its dearest phase, one save, nothing evaluated."""
    data = replace(config.data, eval_split=None, decoded_cache="none", mix="none")
    if isinstance(opened.train, StreamSet):
        data = replace(data, stream=replace(data.stream, classes=len(opened.train.classes)))
    oat = config.pretrain_epochs < config.epochs
    return replace(
        config,
        output_dir=str(folder),
        max_steps=min(STEPS, config.max_steps or STEPS),
        pretrain_epochs=0 if oat else config.pretrain_epochs,
        dry_run=False,
        data=data,
        checkpoint=replace(config.checkpoint, every_epochs=0, every_steps=0, every_minutes=0.0),
        job=JobConfig(check_seconds=config.job.check_seconds),
        log=replace(config.log, trackers="none", profile_steps=None, profile_all_ranks=False),
    )


def practise(config: Config, engine: Engine) -> Trial:
    """Train and save; every rank calls it with a `practice_config`.

    Raises:
        OatError: as the training.
    """
    cuda, device = engine.world.device.type == "cuda", engine.world.device
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    trainer = _TimedTrainer(config, engine)
    trainer.display.shown = False
    started = time.perf_counter()
    trainer.fit()
    ends = trainer.ended
    steps = [after - before for before, after in itertools.pairwise(ends)] or [ends[0] - started]
    folder = Path(config.output_dir) / "checkpoints" / f"step-{trainer.step}"
    size = sum(path.stat().st_size for path in folder.iterdir())
    trainer.replica.close()
    peak = torch.cuda.max_memory_reserved(device) if cuda else 0
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    return Trial(max(steps), trainer.save_seconds, size, peak, memory)


def judge_trial(trials: Sequence[Trial], engine: str) -> Row:
    trial = _slowest(trials)
    found = (
        f"{STEPS} steps under {engine}, {trial.step:.2g} s each; a checkpoint of {bytes_text(trial.size)} in "
        f"{trial.save:.2g} s"
    )
    if trial.memory:
        found += f"; at most {bytes_text(trial.peak)} of {bytes_text(trial.memory)} GPU memory reserved"
    return Row("practice", PASS, found)


def judge_grace(trials: Sequence[Trial], check_seconds: float, grace: float, source: str) -> Row:
    """Stopping takes until the ranks agree, the step under way and one more, and the save."""
    trial = _slowest(trials)
    needed = check_seconds + 2 * trial.step + trial.save
    found = (
        f"a stop takes {needed:.1f} s (job.check_seconds {check_seconds:g}, 2 steps {2 * trial.step:.2g}, save "
        f"{trial.save:.2g}), allowed are {grace:g} s ({source})"
    )
    if needed * _SAFETY <= grace:
        return Row("grace period", PASS, found)
    remedy = f"give it at least {max(needed * _SAFETY, 1):.0f} s: sbatch --signal=B:USR1@SECONDS"
    if trial.save > trial.step + check_seconds:
        remedy += ", or save to a faster file system"
    return Row("grace period", FAIL if needed > grace else WARN, found, remedy)


def _slowest(trials: Sequence[Trial]) -> Trial:
    return Trial(
        max(trial.step for trial in trials),
        max(trial.save for trial in trials),
        trials[0].size,
        max(trial.peak for trial in trials),
        min(trial.memory for trial in trials),
    )


def checkpoint_bytes(config: Config, classes: int) -> int:
    """What a checkpoint will take: weights, and what the optimizer keeps of each that is trained. Takes no memory."""
    with torch.device("meta"):
        network = build_model(config.model.name, classes, image_size=config.data.image_size)
    if config.model.freeze is not None:
        freeze(network, config.model.freeze)
    held = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    copies = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    return held + 4 * copies * trained


def out_of_memory(config: Config) -> Trouble:
    """Where no error of ours says it: outside of the steps themselves."""
    return Trouble(
        "out of GPU memory while the network was put on the GPU",
        f"engine.name=zero3 deals it over the GPUs (now {config.engine.name or 'as launched'}), or take a smaller one",
    )
