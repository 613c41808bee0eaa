"""The evaluations of a run under way, and which step is the best so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oat_dist.config import Config
from oat_dist.console import Display
from oat_dist.data_parts import DataParts
from oat_dist.engine import Engine, Replica
from oat_dist.evaluate import Evaluation
from oat_dist.metrics import AnchorMean
from oat_dist.oat_loss import OATLoss
from oat_dist.pulse import Pulse
from oat_dist.run_folder import RunFolder
from oat_dist.validation import evaluate_network

__all__ = ["EvaluationStoppedError", "RunValidation"]


class EvaluationStoppedError(Exception):
    """Raised on all ranks at the same batch: the run is to stop, and an evaluation may take longer than it has."""


@dataclass
class RunValidation:
    """Evaluates under every protocol on the evaluation split.

    Attributes:
        best: step, split, protocol and accuracy of the best evaluation of this phase; empty before the first.
        due: an evaluation that the run owes: one that was cut short, or is about to begin.
        evaluation: the last one, on rank 0; `evaluated_at` is its step.
    """

    config: Config
    engine: Engine
    replica: Replica
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

    def run(self, step: int, epoch: int, phase: str) -> bool:
        """Evaluate and write it down; True when this is the best so far, False also when the run is to stop first."""
        self.due = True
        try:
            self.evaluate(step, phase)
        except EvaluationStoppedError:
            return False
        self.due = False
        scores = None
        if self.evaluation is not None:
            split = self.config.data.eval_split
            self.folder.log_evaluation(self.evaluation, step=step, epoch=epoch, phase=phase, split=split)
            self.display.say(f"epoch {epoch}/{self.config.epochs} {split}: {self.evaluation}")
            name = "argmax" if "argmax" in self.evaluation.protocols else self.config.eval.protocol
            scores = {"protocol": name, "accuracy": self.evaluation.protocols[name].accuracy}
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
        self.pulse.restart()
        self.replica.sync_buffers()
        config, world = self.config, self.engine.world
        with self.engine.memory(f"lower eval.batch_size={config.eval.batch_size}; it changes no answer"):
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
                on_bad=config.data.on_bad,
                max_bad=config.data.max_bad,
                decoded=self.data.eval_decoded,
                on_batch=self._beat,
            )
        self.evaluated_at = step
        self.pulse.restart()

    def _beat(self) -> None:
        if self.pulse.beat("evaluating"):
            raise EvaluationStoppedError
