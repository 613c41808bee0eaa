"""Test accuracy that does not depend on how the test set was batched, or on how many ranks forwarded it.

One forward pass collects the logits of every sample on rank 0; every protocol is computed from them in float64.

* ``batch`` (the paper's): 32 consecutive samples of a seeded permutation share an anchor. Never the stored order,
  which leaks labels where a set is sorted by class.
* ``single`` (paper 3.5): each sample is its own anchor set.
* ``dataset``: one anchor for all samples.
* ``stored``: the mean training anchor, frozen with the checkpoint: one image in, one answer out.
* ``argmax``: the largest logit, of a network trained with cross-entropy.

Where classes were not equally frequent in training, and under the center "prior", a question may be asked under another
class prior than that of training:
* ``balanced``: the same share for every class. Under the center "prior" ``z + 1`` is the answer, the lift of a class
  over its share; any other OAT network's scores (of ``stored``) are divided by the shares; cross-entropy's logits have
  the logarithms of the shares subtracted, as far as training has not done so itself.
* ``ordinary``: the prior of training, for a network whose own logits are adjusted to balanced classes.
* ``given``: shares that the user names (center "prior").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from oat_dist.anchor import invert
from oat_dist.answers import probabilities_of
from oat_dist.batch import Batch
from oat_dist.data.plan import EpochOrder
from oat_dist.distributed import World
from oat_dist.errors import DataError, not_finite
from oat_dist.objectives import oat_scores
from oat_dist.results import Details, Evaluation, ProtocolResult

__all__ = ["PRIOR_PROTOCOLS", "PROTOCOLS", "Outputs", "collect", "judge"]

PROTOCOLS = ("batch", "single", "dataset", "stored")
PRIOR_PROTOCOLS = ("balanced", "given")  # of the center "prior", besides
# Logits move by 4e-8 between forward batch sizes: two scores nearer than this may swap.
TIE = 1e-5
TOP = 5
_SLICE = 1 << 22  # scores turned into probabilities at a time


@dataclass(frozen=True)
class Outputs:
    """Logits (N, C) in float64, labels (N,) and validity (N,) of a whole split, ordered by sample id."""

    logits_NC: Tensor
    labels_N: Tensor
    valid_N: Tensor


def collect(
    forward: Callable[[Batch], Tensor], batches: Iterable[Batch], num_samples: int, world: World
) -> Outputs | None:
    """Forward this rank's batches and gather everything on rank 0 (None on the other ranks).

    Memory on rank 0: 8 bytes x N x C for the outcome, twice that on the way.

    Raises:
        TrainingError: outputs that are not finite, on every rank.
        DataError: some sample was not seen exactly once.
    """
    if num_samples == 0:
        raise DataError("the evaluation split holds no samples")
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
    num_seeds: int = 0,
    prior_C: Tensor | None = None,
    shares_C: Tensor | None = None,
    adjusted: float = 0.0,
    temperatures: Mapping[str, float] | None = None,
) -> Evaluation:
    """Every protocol from one set of outputs. Undecodable samples take no part.

    Args:
        center: of the OAT anchors; None for a network trained with cross-entropy alone (protocol "argmax" only).
        floor: the anchor floor of training.
        stored_anchor_C: None leaves protocol "stored" out.
        group_size, seed: of protocol "batch".
        num_seeds: 0: labels alone. From 1 on also probabilities and what is made of them (`Details`), and protocol
            "batch" under so many seeds, counting up from `seed`.
        prior_C: center "prior": the class prior (C,) of protocol "given"; None leaves it out.
        shares_C: of the classes in training (C,), where they are not the same for all.
        adjusted: of cross-entropy: the logits are those of shares raised to ``1 - adjusted``. 0: as the data are.
        temperatures: by protocol, as fitted on held-out data; the probabilities of the others are not calibrated.
    """
    if not bool(outputs.valid_N.any()):
        raise DataError("no sample of the evaluation split can be decoded; run shards/verify.py on the data set")
    every, detailed = len(outputs.valid_N), num_seeds > 0
    ids_N = torch.arange(every)[outputs.valid_N]
    logits_NC, labels_N = outputs.logits_NC[ids_N], outputs.labels_N[ids_N]
    undecodable = every - len(ids_N)

    def result(name: str, scores_NC: Tensor) -> ProtocolResult:
        temperature = (temperatures or {}).get(name)
        probabilities = partial(probabilities_of, softmax=center is None, temperature=temperature)
        return _result(scores_NC, labels_N, ids_N, probabilities if detailed else None)

    if center is None:
        results = {"argmax": result("argmax", logits_NC)}
        if shares_C is not None:
            if adjusted:
                results["ordinary"] = result("ordinary", logits_NC + adjusted * shares_C.log())
            results["balanced"] = result("balanced", logits_NC + (adjusted - 1) * shares_C.log())
        return Evaluation(ids_N, labels_N, results, undecodable)

    def batch_scores(seed: int) -> Tensor:
        # The permutation is of all sample ids: it does not move when one image is bad.
        order_N = torch.from_numpy(EpochOrder(every, seed, 0).ids(0, every).copy())
        order_N = order_N[outputs.valid_N[order_N]]
        scores_NC = torch.empty_like(outputs.logits_NC)
        scores_NC[order_N] = oat_scores(outputs.logits_NC[order_N], center, floor, group_size)
        return scores_NC[ids_N]

    # One protocol at a time: each score is as large as the outputs.
    results = {"batch": result("batch", batch_scores(seed))}
    if detailed:
        other = [batch_scores(seed + number).argmax(dim=1) for number in range(1, num_seeds)]
        accuracies = [float((predicted_N == labels_N).double().mean()) for predicted_N in other]
        results["batch"] = _with_seeds(results["batch"], accuracies)
    results["single"] = result("single", oat_scores(logits_NC, center, floor, 1))
    results["dataset"] = result("dataset", oat_scores(logits_NC, center, floor))
    if stored_anchor_C is not None:
        results["stored"] = result("stored", invert(logits_NC, stored_anchor_C.double()))
    if center == "prior":
        results["balanced"] = result("balanced", (logits_NC + 1) / logits_NC.shape[1])
        if prior_C is not None:
            results["given"] = result("given", invert(logits_NC, prior_C.double()))
    elif shares_C is not None and stored_anchor_C is not None:
        anchor_C = stored_anchor_C.double() / (shares_C * len(shares_C))
        results["balanced"] = result("balanced", invert(logits_NC, anchor_C))
    return Evaluation(ids_N, labels_N, results, undecodable)


def _result(
    scores_NC: Tensor, labels_N: Tensor, ids_N: Tensor, probabilities: Callable[[Tensor], Tensor] | None
) -> ProtocolResult:
    predicted_N = scores_NC.argmax(dim=1)
    ties: list[int] = []
    if scores_NC.shape[1] > 1:
        best_N2 = scores_NC.topk(2, dim=1).values
        ties = ids_N[(best_N2[:, 0] - best_N2[:, 1]) < TIE].tolist()
    details = None if probabilities is None else _details(scores_NC, labels_N, predicted_N, probabilities)
    return ProtocolResult(predicted_N, int((predicted_N == labels_N).sum()), len(labels_N), ties, details)


def _details(
    scores_NC: Tensor, labels_N: Tensor, predicted_N: Tensor, probabilities: Callable[[Tensor], Tensor]
) -> Details:
    """In slices of rows: probabilities take several times the memory of the scores."""
    brier, top5, confidences = 0.0, 0, []
    rows = max(_SLICE // scores_NC.shape[1], 1)
    parts = (tensor.split(rows) for tensor in (scores_NC, labels_N, predicted_N))
    for scores_BC, labels_B, predicted_B in zip(*parts, strict=True):
        chances_BC = probabilities(scores_BC)
        confidences.append(chances_BC.gather(1, predicted_B[:, None])[:, 0].float())
        own_B = chances_BC.gather(1, labels_B[:, None])[:, 0]
        brier += float((chances_BC.square().sum(dim=1) - 2 * own_B + 1).sum())
        if scores_NC.shape[1] > TOP:
            top5 += int((scores_BC.topk(TOP, dim=1).indices == labels_B[:, None]).sum())
    return Details(torch.cat(confidences), brier / len(labels_N), top5 if scores_NC.shape[1] > TOP else None)


def _with_seeds(first: ProtocolResult, others: list[float]) -> ProtocolResult:
    assert first.details is not None
    return replace(first, details=replace(first.details, seeds=(first.accuracy, *others)))
