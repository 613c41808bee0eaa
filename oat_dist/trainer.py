"""The spine: build, fit, train_step. Reads from top to bottom.

One step: a window of micro-batches comes from the loader; each goes to the device, is normalised there and forwarded;
the objective gives a loss that is exact over all ranks and micro-batches (`WindowStep`); gradients are exchanged in the
last micro-batch; the engine's replica steps at the learning rate of this global step. Everything scheduled (phase,
learning rate, evaluation, saving) is a pure function of the global step, so that a resumed run cannot differ. Whether
to stop is asked after every step (`Pulse`): all ranks stop after the same one, save, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oat_dist.batch import Window
from oat_dist.checkpoint import CheckpointStore, has_checkpoints
from oat_dist.config import Config
from oat_dist.console import Display
from oat_dist.data.device_copy import windows_on_device
from oat_dist.data_parts import build_data
from oat_dist.ema import WeightAverage
from oat_dist.engine import Engine
from oat_dist.engine.zero_config import BatchShape
from oat_dist.errors import loss_not_finite
from oat_dist.metrics import AnchorMean, Meter
from oat_dist.objectives import OAT, CrossEntropy, Objective
from oat_dist.origin import find_origin
from oat_dist.outcome import write_outcome
from oat_dist.parts import (
    build_criterion,
    build_network,
    build_profiler,
    check_layout,
    inexact,
    learning_rate,
    optimizer_for,
)
from oat_dist.profiling import span
from oat_dist.pulse import Pulse
from oat_dist.run_facts import environment, how_trained, model_card, run_facts, run_identity
from oat_dist.run_folder import RunFolder
from oat_dist.run_log import RunLog
from oat_dist.run_validation import EvaluationStoppedError, RunValidation
from oat_dist.training_state import TrainingState
from oat_dist.window_step import WindowStep

__all__ = ["Trainer"]


class Trainer:
    """Everything one training run consists of.

    Args:
        config: the checked configuration.
        engine: the started engine.
        pulse: through which it can be stopped and watched; None: by nobody.

    Raises:
        OatError: anything about configuration and data that makes this run impossible, before the first step.
    """

    def __init__(self, config: Config, engine: Engine, pulse: Pulse | None = None) -> None:
        self.config, self.engine, self.world = config, engine, engine.world
        self.pulse = pulse or Pulse(self.world)
        self.display = Display(self.world)
        self.folder = RunFolder(Path(config.output_dir), self.world)

        self.data = build_data(config, self.world)
        self.classes = self.data.train_set.classes
        self.identity = run_identity(self.data, engine)
        self.steps_per_epoch = self.data.loader.steps_per_epoch
        self.pretrain_steps = config.pretrain_epochs * self.steps_per_epoch
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)
        self.learning_rate = learning_rate(config, self.steps_per_epoch)
        plan = (self.steps_per_epoch, self.total_steps, self.data.eval_set is not None)
        self.log = RunLog(config, engine, self.folder, self.display, *plan)
        self.profiler = build_profiler(config, self.total_steps, self.world, self.log.say)

        self.criterion = build_criterion(config, len(self.classes))
        self.objectives: tuple[Objective, Objective] = (CrossEntropy(), OAT(self.criterion))
        # A run that goes on has its weights in a checkpoint; the file it started from may be gone.
        begins = config.start_from is None and not self.world.gather_objects(has_checkpoints(self.folder.path))[0]
        network, self.notes = build_network(config, len(self.classes), engine, initial_weights=begins)
        check_layout(config, self.data.loader, network)
        self.notes += self.data.notes + inexact(config, network, self.data.loader.layout)
        if config.model.compile:
            network.compile()
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        layout = self.data.loader.layout
        half = max(layout.largest_part // 2, 1)
        self.memory_remedy = f"try micro_batch_size={half} at the same batch_size={config.batch_size}"
        shape = BatchShape(layout.largest_part, len(layout.deal(config.batch_size)))
        self.replica = engine.prepare(network, optimizer_for(config, network), shape, config.optim.clip_norm)
        self.network = self.replica.network
        self.average = WeightAverage(self.network, config.optim.ema)

        self.step = self.saved_step = 0
        self.start_from: str | None = None  # the checkpoint of another run that this one began as a copy of
        self.bad: dict[int, str] = {}  # undecodable samples of all ranks, known at the end: id -> why
        self.meter = Meter(self.world, min(config.log.every_steps, self.steps_per_epoch))
        self.anchor_mean = AnchorMean(len(self.classes), self.world.device)
        self.state = TrainingState(self.replica, self.average, self.anchor_mean, self.meter, self.world)
        self.validation = RunValidation(
            *(config, engine, self.replica, self.average, self.data, self.criterion, self.anchor_mean),
            *(self.folder, self.display, self.pulse),
        )
        self.window_step = WindowStep(self.replica, self.data.images, config.anchor.span, self._record_loss)

    @property
    def objective(self) -> Objective:
        """The objective of the step about to be taken."""
        return self.objectives[self.step >= self.pretrain_steps]

    @property
    def trained_with(self) -> Objective:
        """The objective of the last step taken."""
        return self.objectives[self.step > self.pretrain_steps]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, evaluation included."""
        evaluated = self.data.eval_set is None or self.validation.evaluated_at == self.step
        return self.step >= self.total_steps and evaluated

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; or until asked to stop: see `finished`."""
        with self.folder.locked(self.config.job), contextlib.closing(self.log), contextlib.closing(self.profiler):
            self.world.together(self.folder.adopt, self.config)
            self.store = CheckpointStore(
                self.folder.path / "checkpoints", self.world, self.config.checkpoint.keep, self.folder.fence
            )
            self.pulse.fence = self.folder.fence
            size = self.config.data.image_size
            self.replica.warm_up(torch.zeros(2, 3, size, size, device=self.world.device))
            self._start()
            with self.display.progress(self.log.pace, self.log.title), self.engine.memory(self.memory_remedy):
                self._train()
            self._finish()

    def _start(self) -> None:
        origin = find_origin(self.config, self.store, self.steps_per_epoch, self.total_steps)
        notes = self.notes + self.folder.notes + (origin.notes if origin else [])
        for note in notes:
            self.display.say(note)
        if origin is not None:
            facts = origin.restore(self.state, self.identity)
            self.step = self.saved_step = facts["step"]
            self.start_from = facts.get("start_from")
            self.validation.best, self.validation.due = facts["best"], facts.get("evaluation_due", False)
            self.log.evaluated(self.validation.best)
            if not origin.own:
                self._save(best=False)  # the other run may go now
            origin.settle(self.store, self.validation.best)
            self.display.say(f"{origin} at step {self.step:,} of {self.total_steps:,}")
        self.folder.cut_torn_line()
        if self.step < self.total_steps or self.validation.due:
            facts = run_facts(self.engine, self.data, self.num_parameters)
            if self.step < self.total_steps:  # else there is nothing to train, and the file says who trained it
                self.folder.write_json("environment.json", environment(self.world, **facts))
            resumed, how = bool(origin and origin.own), how_trained(self.engine, self.start_from)
            self.log.started(self.step, resumed, how, notes)
        if self.validation.due and origin is not None and self._validate():
            self.world.together(self.store.point, origin.checkpoint, self.step)

    def _train(self) -> None:
        windows = windows_on_device(self.data.loader.windows(self.step, self.total_steps), self.world.device)
        self.profiler.resume(self.step)
        self.meter.restart()
        self.pulse.restart()
        self.log.pace.begin(self.step)
        stop = self.pulse.beat("training")
        while self.step < self.total_steps and not stop:
            if self.step == self.pretrain_steps:
                self._begin_oat()
            self.profiler.begin(self.step + 1)
            started = time.perf_counter()
            with span("data wait"):
                window = next(windows)
            waited = time.perf_counter() - started
            norm = self.train_step(window)
            self.meter.end_step(window, waited, self.objective.anchors(), norm)
            self.step += 1
            self.display.step(self.step)
            self.meter.pause(self.profiler.end(self.step))
            stop = self._after_step(window.epoch)

    def _begin_oat(self) -> None:
        """As the authors do with two scripts: the weights go on, the momentum starts anew."""
        self.replica.reset_optimizer()
        self.validation.best = {}  # of the phase: an accuracy under another protocol is no measure for it
        self.log.evaluated({})
        if self.step:
            self.display.say(f"step {self.step:,}: cross-entropy ends, OAT begins")
            self.folder.log(event="phase", step=self.step, phase="oat", time=time.time())

    def train_step(self, window: Window) -> Tensor | None:
        """One optimizer step on this rank's part of a global batch; returns the gradient norm when clipping."""
        num_samples: int | Tensor = window.num_samples
        if self.config.data.on_bad == "skip":  # only then may fewer samples count than the plan says
            valid = torch.tensor(window.num_valid, device=self.world.device, dtype=torch.float64)
            num_samples = self.world.all_reduce(valid).clamp_(min=1)
        self.window_step.run(self.objective, window.batches, num_samples)
        with span("optimizer step"):
            norm = self.replica.step(self.learning_rate(self.step))
            self.average.update()
        return norm

    def _record_loss(self, loss: Tensor) -> None:
        self.meter.add_loss(loss)
        anchors_GC = self.objective.anchors()
        if anchors_GC is not None:
            assert self.criterion.statistics is not None
            self.anchor_mean.add(anchors_GC, self.criterion.statistics.count_G > 0)

    def _after_step(self, epoch: int) -> bool:
        """Log, evaluate and save when it is time; the same decisions on every rank. True: stop now."""
        config, step_in_epoch = self.config, self.step % self.steps_per_epoch
        finished = self.step // self.steps_per_epoch if step_in_epoch == 0 else None
        ended = self.step == self.total_steps
        stop = self.pulse.beat(f"training after step {self.step:,}")
        due = _every(self.step, config.checkpoint.every_steps) or ended or stop
        if finished is not None:
            self.anchor_mean.end_epoch(self.world)
            due = due or _every(finished, config.checkpoint.every_epochs)
        if _every(step_in_epoch, config.log.every_steps) or finished is not None or due:
            self._log(epoch)
            if finished is not None and self.trained_with.name == "oat":
                self.log.anchor(self.step, self.anchor_mean.finished())
            due = due or self.store.minutes_passed(config.checkpoint.every_minutes)
        improved, started = False, time.perf_counter()
        if self.data.eval_set and (ended or (finished is not None and _every(finished, config.eval.every_epochs))):
            self.validation.due = True
            improved = not stop and self._validate()
            stop = bool(self.pulse.stopping)
        if stop:
            self.display.say(f"stopping at step {self.step:,} ({self.pulse.stopping}): saving")
        if due or improved or stop:
            self.display.doing("saving")
            with self.log.pace.saving():
                self._save(improved)
        self.meter.pause(time.perf_counter() - started)
        return stop

    def _validate(self) -> bool:
        self.display.doing("evaluating")
        with self.log.pace.evaluating():
            improved = self.validation.run(self.step, self.step // self.steps_per_epoch, self.trained_with.name)
        self.log.evaluated(self.validation.best, self.validation.evaluation)
        return improved

    def _log(self, epoch: int) -> None:
        interval = self.meter.flush()
        phase = self.trained_with.name
        if interval.first_bad is not None:
            step = self.step - interval.steps + interval.first_bad + 1
            raise loss_not_finite(step, epoch, phase, self.folder.path)
        self.log.interval(self.step, epoch, phase, self.learning_rate(self.step - 1), interval)

    def _save(self, best: bool) -> None:
        self.replica.sync_buffers()
        self.state.check_finite(self.step, self.folder.path)
        shared = self.state.shared(self._facts(), model_card(self.config, self.classes, self.trained_with.name))
        self.store.save(self.step, shared, self.state.own(), best)
        self.saved_step = self.step
        write_outcome(self.config.job.outcome_file, self.world, "running", self.step, self.total_steps)
        self.data.keep_decoded()
        if self.config.data.on_bad == "skip":
            self.log.skipped(self.step, self.data.new_bad(self.bad, self.world))
        self.pulse.restart()

    def _facts(self) -> dict[str, Any]:
        return {
            "checkpoint": f"step-{self.step}",
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "phase": self.trained_with.name,
            "split": self.config.data.eval_split,
            "start_from": self.start_from,
            "best": self.validation.best,
            "evaluation_due": self.validation.due,
            **self.identity,
        }

    def _finish(self) -> None:
        """Evaluate the last step if that has not happened (a finished run was started again); leave evaluation.json."""
        validation = self.validation
        if self.data.eval_set is not None and not self.pulse.stopping and validation.evaluated_at != self.step:
            with contextlib.suppress(EvaluationStoppedError):
                validation.evaluate(self.step, self.trained_with.name)
        if validation.evaluation is not None and validation.evaluated_at == self.step:
            self.folder.write_evaluation(validation.evaluation, self.classes, self._facts() | validation.grouping)
        self.log.skipped(self.step, self.data.new_bad(self.bad, self.world))
        self.data.close()
        stopped = None if self.finished else self.pulse.stopping
        self.log.ended(self.step, stopped, validation.best, validation.evaluation)


def _every(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0
