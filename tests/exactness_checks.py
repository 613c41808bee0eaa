"""What each rank does for test_exactness.py: ten DDP steps under every setting, and the wrong ways of doing it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from reference import distance, parameters_of, plain_loss, small_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oat_dist import OATLoss
from oat_dist.anchor import anchor_targets, batch_anchor, default_floor, global_loss
from oat_dist.data.plan import Layout, Part
from oat_dist.distributed import counts
from oat_dist.engine import start_engine
from oat_dist.objectives import CrossEntropy

INPUTS, CLASSES, STEPS, GROUP = 6, 5, 10, 4
LEARNING_RATE = 0.01
# The global batches: the last but one is short, so that ranks hold unequal counts, one of them perhaps none.
SIZES = [13, 12, 13, 16, 2, 13, 9, 16, 1, 13]


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The joined global batches, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for size in SIZES:
        labels_B = torch.randint(0, CLASSES, (size,), generator=generator)
        inputs_BX = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
        inputs_BX[:, 0] += labels_B  # something to learn
        made.append((inputs_BX.to(dtype), labels_B))
    return made


def deal(size: int, world: int, scope: str, micro_batch_size: int | None) -> list[list[Part]]:
    layout = Layout(max(SIZES), world, micro_batch_size, unit=GROUP if scope == "group" else 1)
    return layout.deal(size)


def anchor_sets(parts: list[list[Part]], scope: str, invalid: set[int]) -> list[list[int]]:
    """The rows of each anchor set of one optimizer step: span micro, so one per micro-batch at least."""
    sets = []
    for micro_batch in parts:
        if scope == "global":
            sets.append([row for part in micro_batch for row in range(part.start, part.stop)])
            continue
        for part in micro_batch:
            width = GROUP if scope == "group" else max(len(part), 1)
            for first in range(part.start, part.stop, width):
                sets.append(list(range(first, min(first + width, part.stop))))
    return [[row for row in rows if row not in invalid] for rows in sets]


def step_ours(
    model: nn.Module, criterion: Any, window: list[tuple[Tensor, Tensor, Tensor | None]], samples: int
) -> None:
    for number, (inputs_BX, labels_B, valid_B) in enumerate(window):
        last = number == len(window) - 1
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                criterion(model(inputs_BX), labels_B, samples, valid_B).backward()
        else:
            criterion(model(inputs_BX), labels_B, samples, valid_B).backward()


def train(
    dtype: torch.dtype,
    scope: str,
    center: str,
    attached: bool,
    micro_batch_size: int | None,
    masked: bool,
    make_criterion: Any = None,
    swap: bool = False,
) -> Tensor:
    """Ten steps on this rank's parts; returns the parameters."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    net = small_net(INPUTS, CLASSES, dtype)
    model: nn.Module = DistributedDataParallel(net) if world > 1 else net
    criterion = OATLoss(CLASSES, center, scope, GROUP, attached) if make_criterion is None else make_criterion()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for inputs_BX, labels_B in batches(dtype):
        if swap:  # one sample is seen twice, another not at all
            inputs_BX, labels_B = inputs_BX.clone(), labels_B.clone()
            inputs_BX[0], labels_B[0] = inputs_BX[-1], labels_B[-1]
        valid = torch.ones(len(labels_B), dtype=torch.bool)
        if masked and len(labels_B) > 3:
            valid[2] = False
        window = []
        for micro_batch in deal(len(labels_B), world, scope, micro_batch_size):
            part = micro_batch[rank]
            rows = slice(part.start, part.stop)
            window.append((inputs_BX[rows], labels_B[rows], valid[rows] if masked else None))
        step_ours(model, criterion, window, int(valid.sum()))
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(net)


def train_reference(
    world: int, dtype: torch.dtype, scope: str, center: str, attached: bool, micro_batch_size: int | None, masked: bool
) -> Tensor:
    """The same ten steps on one process by autograd on the plain formula, given the same anchor sets."""
    net = small_net(INPUTS, CLASSES, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
    floor = default_floor(center, CLASSES, None)
    for inputs_BX, labels_B in batches(dtype):
        invalid = {2} if masked and len(labels_B) > 3 else set()
        parts = deal(len(labels_B), world, scope, micro_batch_size)
        sets = anchor_sets(parts, scope, invalid)
        samples = len(labels_B) - len(invalid)
        plain_loss(net(inputs_BX), labels_B, sets, center, attached, floor, samples).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(net)


class BareAllReduce(nn.Module):
    """The usual mistake: the center is averaged by an all-reduce that autograd does not see."""

    def forward(self, logits_BC: Tensor, labels_B: Tensor, samples: int, valid_B: Tensor | None) -> Tensor:
        world = dist.get_world_size()
        center_C = logits_BC.softmax(dim=1).sum(dim=0)
        total_C = center_C.detach().clone()
        dist.all_reduce(total_C)
        # value of the global center, gradient of the local one
        center_C = (center_C + (total_C - center_C.detach())) / samples
        targets_BC = anchor_targets(labels_B, center_C.softmax(dim=0))
        return world * (logits_BC - targets_BC).square().sum() / (samples * CLASSES)


def matrix() -> dict[str, float]:
    """Distance to the reference for every setting, keyed ``dtype/scope/center/gradient/micro/mask``."""
    engine = start_engine()
    world = engine.world.size
    found = {}
    for dtype, scope, center, attached in itertools.product(
        (torch.float64, torch.float32),
        ("device", "global", "group"),
        ("probabilities", "logits", "prior"),
        (True, False),
    ):
        for micro_batch_size, masked in ((None, False), (None, True), (GROUP, False)):
            start = parameters_of(small_net(INPUTS, CLASSES, dtype))
            theta = train(dtype, scope, center, attached, micro_batch_size, masked)
            reference = train_reference(world, dtype, scope, center, attached, micro_batch_size, masked)
            key = "/".join(
                [
                    str(dtype).removeprefix("torch."),
                    scope,
                    center,
                    "attached" if attached else "detached",
                    "accumulated" if micro_batch_size else "whole",
                    "masked" if masked else "all",
                ]
            )
            found[key] = distance(theta, reference, start)
    engine.close()
    return found


def controls() -> dict[str, float]:
    """Distances of ways that must be far off, for the same measure (float64, global, probabilities, attached)."""
    engine = start_engine()
    dtype = torch.float64
    start = parameters_of(small_net(INPUTS, CLASSES, dtype))
    reference = train_reference(engine.world.size, dtype, "global", "probabilities", True, None, False)

    def off(**changes: Any) -> float:
        arguments: dict[str, Any] = {"scope": "global", "center": "probabilities", "attached": True, **changes}
        return distance(train(dtype, micro_batch_size=None, masked=False, **arguments), reference, start)

    found = {
        "right": off(),
        "bare all-reduce": off(make_criterion=BareAllReduce),
        "per-rank anchor": off(scope="device"),
        "swapped sample": off(swap=True),
    }
    engine.close()
    return found


def one_call() -> dict[str, Any]:
    """Facts of single calls on unequal ranks: collectives, loss, anchors, empty ranks, eval mode."""
    engine = start_engine()
    world, rank = engine.world.size, engine.world.rank
    torch.manual_seed(3)
    logits_NC = torch.randn(9, CLASSES, dtype=torch.float64)
    labels_N = torch.randint(0, CLASSES, (9,))
    # The last rank has nothing.
    cuts = [0, *(min(5 * (r + 1), 9) for r in range(world - 1)), 9] if world < 3 else [0, 5, 9, 9]
    mine = slice(cuts[rank], cuts[rank + 1])
    found: dict[str, Any] = {"count": len(labels_N[mine])}
    for scope in ("device", "global", "group"):
        criterion = OATLoss(CLASSES, "probabilities", scope, GROUP)
        for given in (None, 9):
            logits = logits_NC[mine].clone().requires_grad_()
            counts.clear()
            loss = criterion(logits, labels_N[mine], given)
            forward = counts["all_reduce"]
            loss.backward()
            total = engine.world.all_reduce(loss.detach().clone()) / world
            key = f"{scope}/{'given' if given else 'summed'}"
            found[key] = {
                "collectives": forward,
                "in backward": counts["all_reduce"] - forward - (1 if world > 1 else 0),
                "loss": float(total),
                "gradient shape": list(logits.grad.shape),
                "finite": bool(torch.isfinite(logits.grad).all()),
                "anchor shape": list(criterion.anchor.shape),
            }
        if scope == "global":
            found["global anchor"] = criterion.anchor.tolist()
            found["expected anchor"] = batch_anchor(logits_NC).tolist()
            found["global loss"] = float(global_loss(criterion.statistics, criterion.anchor[None]))
        criterion.eval()
        counts.clear()
        criterion(logits_NC[mine], labels_N[mine])
        found[f"{scope}/eval collectives"] = counts["all_reduce"]
    cross_entropy = CrossEntropy().loss(logits_NC[mine], labels_N[mine], 9, None)
    found["cross entropy"] = float(engine.world.all_reduce(cross_entropy.clone()) / world)
    found["expected cross entropy"] = float(nn.functional.cross_entropy(logits_NC, labels_N))
    engine.close()
    return found
