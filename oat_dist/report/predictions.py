"""evaluation.safetensors: the answer to every sample of an evaluation. Read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from oat_dist.report.evaluation import Evaluation

__all__ = ["PREDICTIONS_NAME", "Predictions", "check_predictions", "read_predictions"]

PREDICTIONS_NAME = "evaluation.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Sample ids (N,), ascending, their labels (N,), and for each protocol the predicted classes (N,).

    `confidence` holds the probability (N,) of the predicted class, of the protocols for which it was saved. `digest`
    names the data set exactly; empty where it is not known, as `checkpoint` and `split`.
    """

    ids_N: np.ndarray
    labels_N: np.ndarray
    predicted: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    checkpoint: str
    split: str
    digest: str

    def right_N(self, protocol: str) -> np.ndarray:
        """Which samples (N,) are right, bool."""
        return self.predicted[protocol] == self.labels_N


def read_predictions(path: Path, warnings: list[str]) -> Predictions | None:
    """The answers in a file; None where there is none, and a warning where it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # also of odd types
        warnings.append(f"{path.name} cannot be read ({_in_a_line(error)}) and was left out.")
        return None
    ids_N, labels_N = tensors.pop("ids", None), tensors.pop("labels", None)
    problem = _misfit(ids_N, labels_N, tensors)
    if ids_N is None or labels_N is None or problem:
        warnings.append(f"{path.name} is damaged ({problem}) and was left out.")
        return None
    return Predictions(
        ids_N,
        labels_N,
        {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("predicted.")},
        {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("confidence.")},
        *(str(facts.get(key, "")) for key in ("checkpoint", "split", "eval_digest")),
    )


def check_predictions(
    predictions: Predictions | None, evaluation: Evaluation | None, warnings: list[str]
) -> Predictions | None:
    """`predictions` where they belong to `evaluation`; None and a warning where they are of something else."""
    if predictions is None:
        return None
    if evaluation is None:
        warnings.append(f"{PREDICTIONS_NAME} has no evaluation.json beside it and was left out.")
        return None
    theirs = evaluation.raw.get("checkpoint")
    if predictions.checkpoint and theirs is not None and predictions.checkpoint != theirs:
        warnings.append(
            f"{PREDICTIONS_NAME} is of checkpoint {predictions.checkpoint}, evaluation.json of {theirs}: left out."
        )
        return None
    for score in evaluation.scores:
        if score.correct is None or score.protocol not in predictions.predicted:
            continue
        right = int(predictions.right_N(score.protocol).sum())
        if right != score.correct:
            warnings.append(
                f"{PREDICTIONS_NAME} has {right:,} samples right under {score.protocol!r}, evaluation.json "
                f"{score.correct:,}: left out."
            )
            return None
    return predictions


def _misfit(ids_N: np.ndarray | None, labels_N: np.ndarray | None, tensors: dict[str, np.ndarray]) -> str:
    """What is wrong with the columns; empty where nothing is."""
    if ids_N is None or labels_N is None:
        return "ids or labels are missing"
    whole = [ids_N, labels_N, *(t for name, t in tensors.items() if name.startswith("predicted."))]
    confidences = [t for name, t in tensors.items() if name.startswith("confidence.")]
    if any(tensor.ndim != 1 or len(tensor) != len(ids_N) for tensor in (*whole, *confidences)):
        return "columns of unequal length"
    if any(tensor.dtype.kind not in "iu" or (len(tensor) and tensor.min() < 0) for tensor in whole):
        return "ids or classes are not whole numbers from 0 on"
    return "" if bool(np.all(np.diff(ids_N.astype(np.int64)) > 0)) else "ids do not ascend"


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or error.__class__.__name__
