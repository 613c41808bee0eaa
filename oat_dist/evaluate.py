"""Test accuracy that does not depend on how the test set was batched, or on how many ranks forwarded it.

One forward pass collects the logits of every sample on rank 0; every protocol is computed from them in float64.

* ``batch`` (the paper's): 32 consecutive samples of a seeded permutation share an anchor. Never the stored order,
  which leaks labels where a set is sorted by class.
* ``single`` (paper 3.5): each sample is its own anchor set.
* ``dataset``: one anchor for all samples.
* ``stored``: the mean training anchor, frozen with the checkpoint: one image in, one answer out.
* ``argmax``: the largest logit; the only one for a network trained with cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oat_dist.anchor import invert
from oat_dist.batch import Batch
from oat_dist.data.plan import EpochOrder
from oat_dist.distributed import World
from oat_dist.errors import DataError, not_finite
from oat_dist.objectives import oat_scores

__all__ = ["PROTOCOLS", "Evaluation", "Outputs", "ProtocolResult", "collect", "judge"]

PROTOCOLS = ("batch", "single", "dataset", "stored")
# Logits move by 4e-8 between forward batch sizes: two scores nearer than this may swap.
TIE = 1e-5


@dataclass(frozen=True)
class Outputs:
    """Logits (N, C) in float64, labels (N,) and validity (N,) of a whole split, ordered by sample id."""

    logits_NC: Tensor
    labels_N: Tensor
    valid_N: Tensor


@dataclass(frozen=True)
class ProtocolResult:
    """Predicted classes (N,) of the evaluated samples and how many are right; `ties` are ids too close to call."""

    predicted_N: Tensor
    correct: int
    total: int
    ties: list[int]

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Evaluation:
    """Results by protocol, with the ids and labels they refer to."""

    ids_N: Tensor
    labels_N: Tensor
    protocols: dict[str, ProtocolResult] = field(default_factory=dict)

    def __str__(self) -> str:
        return "  ".join(f"{name} {result.accuracy:.2%}" for name, result in self.protocols.items())

    def summary(self, classes: list[str]) -> dict[str, Any]:
        """What goes into evaluation.json."""
        num_classes = len(classes)
        count_C = torch.bincount(self.labels_N, minlength=num_classes)
        per_class = {}
        for name, result in self.protocols.items():
            right_C = torch.bincount(self.labels_N[result.predicted_N == self.labels_N], minlength=num_classes)
            per_class[name] = (right_C / count_C.clamp(min=1)).tolist()
        return {
            "class_names": classes,
            "total": len(self.labels_N),
            "protocols": {
                name: {"accuracy": result.accuracy, "correct": result.correct, "ties": result.ties}
                for name, result in self.protocols.items()
            },
            "per_class": per_class,
        }


def collect(
    forward: Callable[[Batch], Tensor], batches: Iterable[Batch], num_samples: int, world: World
) -> Outputs | None:
    """Forward this rank's batches and gather everything on rank 0 (None on the other ranks).

    Memory on rank 0: 8 bytes x N x C for the outcome, twice that on the way.

    Raises:
        TrainingError: outputs that are not finite, on every rank.
        DataError: some sample was not seen exactly once.
    """
    ids, labels, valid, logits = [], [], [], []
    with torch.no_grad():  # not inference mode: weights that are gathered in it could not be trained on
        for batch in batches:
            outputs_BC = forward(batch)
            if batch.empty:
                continue
            ids.append(batch.ids_B)
            labels.append(batch.labels_B)
            valid.append(batch.every_valid())
            logits.append(outputs_BC.float())
        width = outputs_BC.shape[1]
    empty = torch.zeros(0, dtype=torch.int64)
    # One integer table: id, label, valid.
    table_N3 = torch.stack(
        [
            torch.cat([empty, *ids]),
            torch.cat([empty, *labels]),
            torch.cat([empty, *(v.long() for v in valid)]),
        ],
        dim=1,
    )
    all_logits_NC = torch.cat(logits) if logits else outputs_BC.new_zeros((0, width))
    if not world.all_agree(bool(torch.isfinite(all_logits_NC).all())):
        raise not_finite("outputs of the network are not finite: it has diverged; go back to an earlier checkpoint")
    table = world.gather_rows(table_N3)
    gathered = world.gather_rows(all_logits_NC)
    if table is None or gathered is None:
        return None
    ids_N, order_N = table[:, 0].sort()
    if not torch.equal(ids_N, torch.arange(num_samples)):
        raise DataError(
            f"evaluation saw {len(ids_N)} samples of {num_samples}, or some of them twice: a defect of ours"
        )
    return Outputs(gathered[order_N].double(), table[order_N, 1], table[order_N, 2].bool())


def judge(
    outputs: Outputs,
    *,
    center: str | None,
    floor: float = 0.0,
    stored_anchor_C: Tensor | None = None,
    group_size: int = 32,
    seed: int = 0,
) -> Evaluation:
    """Every protocol from one set of outputs. Undecodable samples take no part.

    Args:
        center: of the OAT anchors; None for a network trained with cross-entropy alone (protocol "argmax" only).
        floor: the anchor floor of training.
        stored_anchor_C: None leaves protocol "stored" out.
        group_size, seed: of protocol "batch".
    """
    if not bool(outputs.valid_N.any()):
        raise DataError("no sample of the evaluation split can be decoded; run shards/verify.py on the data set")
    ids_N = torch.arange(len(outputs.valid_N))[outputs.valid_N]
    logits_NC, labels_N = outputs.logits_NC[ids_N], outputs.labels_N[ids_N]
    if center is None:
        return Evaluation(ids_N, labels_N, {"argmax": _result(logits_NC, labels_N, ids_N)})
    # The permutation is of all sample ids: it does not move when one image is bad.
    order_N = torch.from_numpy(EpochOrder(len(outputs.valid_N), seed, 0).ids(0, len(outputs.valid_N)).copy())
    order_N = order_N[outputs.valid_N[order_N]]
    batch_scores_NC = torch.empty_like(outputs.logits_NC)
    batch_scores_NC[order_N] = oat_scores(outputs.logits_NC[order_N], center, floor, group_size)
    results = {"batch": _result(batch_scores_NC[ids_N], labels_N, ids_N)}
    del batch_scores_NC  # one protocol at a time: each score is as large as the outputs
    results["single"] = _result(oat_scores(logits_NC, center, floor, 1), labels_N, ids_N)
    results["dataset"] = _result(oat_scores(logits_NC, center, floor), labels_N, ids_N)
    if stored_anchor_C is not None:
        results["stored"] = _result(invert(logits_NC, stored_anchor_C.double()), labels_N, ids_N)
    return Evaluation(ids_N, labels_N, results)


def _result(scores_NC: Tensor, labels_N: Tensor, ids_N: Tensor) -> ProtocolResult:
    predicted_N = scores_NC.argmax(dim=1)
    ties: list[int] = []
    if scores_NC.shape[1] > 1:
        best_N2 = scores_NC.topk(2, dim=1).values
        ties = ids_N[(best_N2[:, 0] - best_N2[:, 1]) < TIE].tolist()
    return ProtocolResult(predicted_N, int((predicted_N == labels_N).sum()), len(labels_N), ties)
