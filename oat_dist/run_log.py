"""What a run says while it trains: lines of metrics.jsonl, and through them to the trackers; the person who watches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from oat_dist.config import Config
from oat_dist.console import Display
from oat_dist.engine import Engine
from oat_dist.engine.trackers import parse_trackers
from oat_dist.metrics import Interval
from oat_dist.pace import Pace, evaluations_left, in_words
from oat_dist.results import Evaluation
from oat_dist.run_folder import RunFolder, flatten
from oat_dist.trackers import Trackers, summary

__all__ = ["RunLog"]


class RunLog:
    """Of one start of a run.

    Args:
        engine: whose Accelerator starts the trackers of the configuration.
        steps_per_epoch, total: of the whole run.
        evaluates: whether the run has a split to evaluate on.

    Attributes:
        pace: of this start.

    Raises:
        ConfigError: a tracker's package is missing.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        folder: RunFolder,
        display: Display,
        steps_per_epoch: int,
        total: int,
        evaluates: bool,
    ) -> None:
        self.config, self.folder, self.display = config, folder, display
        self.steps_per_epoch, self.total = steps_per_epoch, total
        self.pace = Pace(total, self._evaluations_after if evaluates else lambda step: 0)
        self.trackers = Trackers(parse_trackers(config.log.trackers), engine, self.say)
        folder.on_line = self.trackers.record
        self._step = 0

    def started(self, step: int, resumed: bool, how: dict[str, Any], notes: Sequence[str]) -> None:
        """The run begins, or goes on, after `step`; all ranks call it.

        Args:
            how: the run is trained: engine, precision and the like.
            notes: that have been said so far.

        Raises:
            LaunchError: on every rank, when a tracker cannot be started.
        """
        self._step = step
        self.folder.log(event="resume" if resumed else "start", step=step, time=time.time(), **how)
        self._keep_warnings(notes)
        settings = flatten(dataclasses.asdict(self.config)) | how
        self.trackers.start(self.folder.path, self.config.log.project, settings, step if resumed else None)

    def close(self) -> None:
        self.trackers.close()

    def say(self, text: str) -> None:
        """To whoever watches this rank; a warning is kept for the report, too."""
        self.display.say_here(text)
        self._keep_warnings([text])

    def _keep_warnings(self, said: Sequence[str]) -> None:
        for text in said:
            if text.startswith(("warning:", "note:")):
                self.folder.log(event="warning", text=text, step=self._step, time=time.time())

    def interval(self, step: int, epoch: int, phase: str, lr: float, interval: Interval) -> None:
        """The steps since the last line; `epoch` counts from 0, and is the one they belong to."""
        values = interval.values
        self._step = step
        self.pace.trained(interval.steps, values["seconds"])
        self.folder.log(step=step, epoch=epoch, phase=phase, lr=lr, **values)
        rate, wait = values["samples_per_s"], values["data_wait"]
        text, memory = f"loss {values['loss']:.4g}  {rate:,.0f} samples/s  data wait {wait:.0%}", values["memory_gb"]
        self.display.numbers(f"{text}  {memory:.2f} GB")
        if step % self.steps_per_epoch == 0:
            line, left = f"{self.title(step - 1)} {text}", self.pace.seconds_left(step)
            if not self.display.live:  # where the view does not show it
                line += f"  {memory:.2f} GB" + (f"  {in_words(left)} left" if left else "")
            self.display.say(line)

    def title(self, step: int) -> str:
        """Epoch and phase of the step after `step` steps."""
        epochs, last = self.config.epochs, step >= self.total
        epoch = (step - last) // self.steps_per_epoch
        return f"epoch {epoch + 1}/{epochs} {'cross_entropy' if epoch < self.config.pretrain_epochs else 'oat'}"

    def anchor(self, step: int, anchor_C: list[float] | None) -> None:
        """The mean training anchor of an epoch that has ended with `step`; None: it had no anchors."""
        if anchor_C is not None:
            self.folder.log(step=step, epoch=step // self.steps_per_epoch, phase="oat", anchor=anchor_C)

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Undecodable samples that the ranks have met since the last time."""
        if samples:
            self.folder.log(event="skipped", step=step, samples=samples, time=time.time())

    def evaluated(self, best: dict[str, Any], last: Evaluation | None = None) -> None:
        """The best evaluation of this phase, empty while there is none, and the last one of this start."""
        protocol = best.get("protocol", "")
        accuracy = last.protocols[protocol].accuracy if last is not None and protocol in last.protocols else None
        self.display.evaluated(protocol, accuracy, best.get("accuracy"))

    def ended(self, step: int, stopped: str | None, best: dict[str, Any], last: Evaluation | None) -> None:
        """The run has ended, by itself (None) or because of `stopped`; trackers get its summary."""
        if stopped is None and last is not None:
            accuracies = {name: result.accuracy for name, result in last.protocols.items()}
            self.trackers.log(summary(best, accuracies), step)
        event = {"event": "finished"} if stopped is None else {"event": "stopped", "reason": stopped}
        self.folder.log(**event, step=step, time=time.time())

    def _evaluations_after(self, step: int) -> int:
        return evaluations_left(step, self.total, self.steps_per_epoch, self.config.eval.every_epochs)
