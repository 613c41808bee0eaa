"""The evaluations of a run under way, and which step is the best so far."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from oat_dist.config import Config
from oat_dist.console import Display
from oat_dist.data_parts import DataParts
from oat_dist.ema import WeightAverage
from oat_dist.engine import Engine, Replica
from oat_dist.metrics import AnchorMean
from oat_dist.oat_loss import OATLoss
from oat_dist.pulse import Pulse
from oat_dist.results import Evaluation
from oat_dist.run_folder import RunFolder
from oat_dist.validation import evaluate_network

__all__ = ["EvaluationStoppedError", "RunValidation"]

_SEEDS = 5  # of protocol "batch", in the evaluation of the last step: how far its accuracy moves with the groups


class EvaluationStoppedError(Exception):
    """Raised on all ranks at the same batch: the run is to stop, and an evaluation may take longer than it has."""


@dataclass
class RunValidation:
    """Evaluates under every protocol on the evaluation split.

    Attributes:
        best: step, split, protocol and accuracy of the best evaluation of this phase, and its accuracies under every
            protocol; empty before the first.
        due: an evaluation that the run owes: one that was cut short, or is about to begin.
        evaluation: the last one, on rank 0; `evaluated_at` is its step.
    """

    config: Config
    engine: Engine
    replica: Replica
    average: WeightAverage
    data: DataParts
    criterion: OATLoss
    anchor_mean: AnchorMean
    folder: RunFolder
    display: Display
    pulse: Pulse
    best: dict[str, Any] = field(default_factory=dict)
    due: bool = False
    evaluation: Evaluation | None = None
    evaluated_at: int = -1
    _batches: int = 0  # of the evaluation under way

    def run(self, step: int, epoch: int, phase: str) -> bool:
        """Evaluate and write it down; True when this is the best so far, False also when the run is to stop first."""
        self.due = True
        started = time.perf_counter()
        try:
            self.evaluate(step, phase)
        except EvaluationStoppedError:
            return False
        self.due = False
        scores = None
        if self.evaluation is not None:
            split = self.config.data.eval_split
            seconds = round(time.perf_counter() - started, 3)
            where = {"step": step, "epoch": epoch, "phase": phase, "split": split, "seconds": seconds}
            self.folder.log_evaluation(self.evaluation, **where)
            self.display.say(f"epoch {epoch}/{self.config.epochs} {split}: {self.evaluation}")
            name = "argmax" if "argmax" in self.evaluation.protocols else self.config.eval.protocol
            accuracies = {key: result.accuracy for key, result in self.evaluation.protocols.items()}
            scores = {"protocol": name, "accuracy": accuracies[name], "accuracies": accuracies}
        scores = self.engine.world.gather_objects(scores)[0]
        if scores["accuracy"] <= self.best.get("accuracy", -1.0):
            return False
        self.best = {"step": step, "split": self.config.data.eval_split, **scores}
        return True

    def evaluate(self, step: int, phase: str) -> None:
        """Leave the result in `evaluation` on rank 0.

        Raises:
            EvaluationStoppedError: on all ranks, when the run is asked to stop.
        """
        assert self.data.eval_set is not None
        self._batches = 0
        self.pulse.restart()
        config, world = self.config, self.engine.world
        remedy = f"lower eval.batch_size={config.eval.batch_size}; it changes no answer"
        with self.average.in_place(), self.engine.memory(remedy):
            self.replica.sync_buffers()
            self.evaluation = evaluate_network(
                self.replica.forward_only,
                self.data.eval_set,
                self.data.normalise,
                world,
                pipeline=self.data.eval_pipeline,
                center=self.criterion.center if phase == "oat" else None,
                floor=self.criterion.anchor_floor,
                stored_anchor_C=self.anchor_mean.value(world),
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
                group_size=config.eval.group_size,
                seed=config.eval.seed,
                num_seeds=_SEEDS if step >= self._last_step else 0,
                on_bad=config.data.on_bad,
                max_bad=config.data.max_bad,
                decoded=self.data.eval_decoded,
                on_batch=self._beat,
            )
        self.evaluated_at = step
        self.pulse.restart()

    @property
    def grouping(self) -> dict[str, int]:
        """How protocol "batch" forms its groups."""
        return {"seed": self.config.eval.seed, "group_size": self.config.eval.group_size}

    @property
    def _last_step(self) -> int:
        return min(self.config.epochs * self.data.loader.steps_per_epoch, self.config.max_steps or sys.maxsize)

    def _beat(self) -> None:
        assert self.data.eval_set is not None
        total, at_once = self.data.eval_set.num_samples, self.config.eval.batch_size * self.engine.world.size
        self.display.evaluating(min(self._batches * at_once, total), total)
        self._batches += 1
        if self.pulse.beat("evaluating"):
            raise EvaluationStoppedError
