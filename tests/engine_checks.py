"""What each rank does for test_engines.py: ten steps under every setting on one engine, against plain autograd."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from reference import distance, plain_loss
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from oat_dist import OATLoss
from oat_dist.anchor import anchor_targets, default_floor
from oat_dist.batch import Batch
from oat_dist.data.plan import Layout
from oat_dist.distributed import counts
from oat_dist.engine import Engine, Replica, start_engine
from oat_dist.engine.zero import Zero
from oat_dist.engine.zero_config import BatchShape
from oat_dist.errors import TrainingError
from oat_dist.models.heads import Fp32Linear
from oat_dist.objectives import OAT, CrossEntropy, Objective
from oat_dist.window_step import WindowStep

SIZE, CLASSES, STEPS, GROUP = 16, 5, 10, 4
LEARNING_RATE = 0.003
# Global batches; the short ones leave ranks with unequal counts, the last with none on one of them.
SIZES = [16, 16, 13, 16, 6, 16, 9, 16, 1, 16]


def small_vit() -> nn.Module:
    """A ViT without BatchNorm and dropout, the same whenever it is called.

    torchvision's head starts at zero, which would leave the trunk without gradients: it is initialised anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        vit = VisionTransformer(
            image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
        )
        vit.heads.head = Fp32Linear(16, CLASSES)
    return vit


def batches() -> list[tuple[Tensor, Tensor]]:
    """The joined global batches, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for size in SIZES:
        labels_B = torch.randint(0, CLASSES, (size,), generator=generator)
        images_BCHW = torch.randn(size, 3, SIZE, SIZE, generator=generator)
        images_BCHW[:, 0] += labels_B[:, None, None] - 2.0  # something to learn
        made.append((images_BCHW, labels_B))
    return made


def layout_of(engine: Engine, scope: str, span: str, micro_batch_size: int | None, group: int) -> Layout:
    unit = group if scope == "group" else 1
    return Layout(max(SIZES), engine.world.size, micro_batch_size, unit=unit, whole_shares=span == "step")


def anchor_sets(layout: Layout, count: int, scope: str, span: str, group: int) -> list[list[int]]:
    """The rows of each anchor set of one global batch of `count` samples."""
    dealt = layout.deal(count)
    if span == "step":  # each rank's share as a whole
        dealt = [[_joined(parts) for parts in zip(*dealt, strict=True)]]
    sets = []
    for parts in ([range(part.start, part.stop) for part in parts] for parts in dealt):
        if scope == "global":
            sets.append([row for part in parts for row in part])
        elif scope == "device":
            sets += [list(part) for part in parts]
        else:
            sets += [list(part[first : first + group]) for part in parts for first in range(0, len(part), group)]
    return [rows for rows in sets if rows]


def _joined(parts: tuple[Any, ...]) -> Any:
    return type(parts[0])(parts[0].start, parts[-1].stop)


def window(layout: Layout, rank: int, images_BCHW: Tensor, labels_B: Tensor) -> list[Batch]:
    """This rank's micro-batches; the images are already what `images_of` would make of them."""
    made = []
    for parts in layout.deal(len(labels_B)):
        rows = slice(parts[rank].start, parts[rank].stop)
        if len(parts[rank]):
            made.append(Batch(images_BCHW[rows], labels_B[rows], labels_B[rows]))
        else:
            one = torch.zeros(1, dtype=torch.int64)
            made.append(Batch(torch.zeros(1, 3, SIZE, SIZE), one, one, torch.zeros(1, dtype=torch.bool), empty=True))
    return made


def prepare(engine: Engine, layout: Layout) -> Replica:
    net = small_vit()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    shape = BatchShape(layout.largest_part, len(layout.deal(max(SIZES))))
    replica = engine.prepare(net, optimizer, shape)
    replica.warm_up(torch.zeros(2, 3, SIZE, SIZE))
    return replica


def train(engine: Engine, layout: Layout, objective: Objective, span: str, swap: bool = False) -> Tensor:
    """Ten steps on this rank's parts; the parameters, on rank 0 (zeros elsewhere)."""
    replica = prepare(engine, layout)
    step = WindowStep(replica, lambda batch: batch.images_BHWC, span, lambda loss: None)
    for images_BCHW, labels_B in batches():
        if swap:  # one sample is seen twice, another not at all
            images_BCHW, labels_B = images_BCHW.clone(), labels_B.clone()
            images_BCHW[0], labels_B[0] = images_BCHW[-1], labels_B[-1]
        step.run(objective, window(layout, engine.world.rank, images_BCHW, labels_B), len(labels_B))
        replica.step(LEARNING_RATE)
    theta = flat(replica.weights(), engine)
    replica.close()
    return theta


def flat(weights: dict[str, Tensor], engine: Engine) -> Tensor:
    return parameters(weights) if engine.world.is_main else torch.zeros(1)


def parameters(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().flatten().double() for name in sorted(weights)])


def reference(sets_of: Any, loss_of: Any, precision: str) -> Tensor:
    """The same ten steps on one process, the joined batch in one piece, by autograd on the plain formula."""
    net = small_vit()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for images_BCHW, labels_B in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits_BC = net(images_BCHW)
        loss_of(logits_BC.float(), labels_B, sets_of(len(labels_B))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(net.state_dict())


def oat_reference(sets_of: Any, center: str, attached: bool, precision: str = "no") -> Tensor:
    floor = default_floor(center, CLASSES, None)
    return reference(
        sets_of,
        lambda logits_BC, labels_B, sets: plain_loss(logits_BC, labels_B, sets, center, attached, floor, len(labels_B)),
        precision,
    )


def oat(scope: str, attached: bool = True, group: int = GROUP, center: str = "probabilities") -> OAT:
    return OAT(OATLoss(CLASSES, center, scope, group, attached))


VARIANTS = {  # name: (span, micro-batch size, group size)
    "micro": ("micro", None, GROUP),
    "micro, 2 micro-batches": ("micro", 4, GROUP),
    "step, 2 micro-batches": ("step", 4, 2 * GROUP),  # groups larger than a micro-batch
}


def matrix(name: str, deepspeed: str | None, precision: str) -> dict[str, Any]:
    """Distances to the reference of every setting on one engine, with controls, collectives and what is held where."""
    engine = start_engine(name=name, deepspeed=deepspeed, precision=precision, threads=1)
    assert (engine.name, engine.precision) == (name, precision)
    if precision == "bf16":
        found = bf16(engine)
    else:
        found = {
            "distances": distances(engine),
            "controls": controls(engine),
            "collectives": collectives(engine),
            "refused": not_finite(engine),
        }

        if engine.plan.stage:
            found["partitions"] = partitions(engine)
    engine.close()
    return found


def sets_of_batch(plan: Layout, scope: str, span: str, group: int, joined: bool, count: int) -> list[list[int]]:
    sets = anchor_sets(plan, count, scope, span, group)
    if joined:  # METHOD: the plain joined batch
        assert sets == [list(range(count))]
    return sets


def distances(engine: Engine) -> dict[str, float]:
    start = parameters(small_vit().state_dict())
    found = {}
    for (variant, (span, micro, group)), scope, attached in itertools.product(
        VARIANTS.items(), ("device", "global", "group"), (True, False)
    ):
        plan = layout_of(engine, scope, span, micro, group)
        theta = train(engine, plan, oat(scope, attached, group), span)
        if not engine.world.is_main:
            continue

        joined = scope == "global" and (span == "step" or micro is None)
        sets_of = functools.partial(sets_of_batch, plan, scope, span, group, joined)
        expected = oat_reference(sets_of, "probabilities", attached)
        found[f"{scope}/{variant}/{'attached' if attached else 'detached'}"] = distance(theta, expected, start)
    return found


def controls(engine: Engine) -> dict[str, float]:
    """Distances of wrong ways, for the same measure: global anchors, attached, are meant."""
    start = parameters(small_vit().state_dict())
    plain = oat_reference(lambda count: [list(range(count))], "probabilities", True)

    def off(objective: Objective, span: str = "micro", micro: int | None = None, swap: bool = False) -> float:
        theta = train(engine, layout_of(engine, "global", span, micro, GROUP), objective, span, swap)
        return distance(theta, plain, start) if engine.world.is_main else 0.0

    return {
        "right": off(oat("global"), "step", 4),
        "bare all-reduce": off(BareAllReduce()),
        "per-rank anchor": off(oat("device")),
        "anchor of a micro-batch": off(oat("global"), "micro", 4),
        "swapped sample": off(oat("global"), swap=True),
    }


class BareAllReduce:
    """The usual mistake: the center is averaged by an all-reduce that autograd does not see."""

    name, couples_samples = "bare", False

    def loss(self, logits_BC: Tensor, labels_B: Tensor, num_samples: int, valid_B: Tensor | None) -> Tensor:
        world = torch.distributed.get_world_size()
        keep_B1 = torch.ones(len(labels_B), 1) if valid_B is None else valid_B[:, None].float()
        center_C = (logits_BC.softmax(dim=1) * keep_B1).sum(dim=0)
        total_C = center_C.detach().clone()
        torch.distributed.all_reduce(total_C)
        center_C = (center_C + (total_C - center_C.detach())) / num_samples
        error_BC = (logits_BC - anchor_targets(labels_B, center_C.softmax(dim=0))) * keep_B1
        return world * error_BC.square().sum() / (num_samples * CLASSES)

    def anchors(self) -> Tensor | None:
        return None


def collectives(engine: Engine) -> dict[str, int]:
    """Our own all-reduces in one optimizer step of two micro-batches."""
    found = {}
    images_BCHW, labels_B = batches()[0]
    for scope, span in itertools.product(("device", "global", "group"), ("micro", "step")):
        plan = layout_of(engine, scope, span, 4, GROUP)
        replica = prepare(engine, plan)
        step = WindowStep(replica, lambda batch: batch.images_BHWC, span, lambda loss: None)
        counts.clear()
        step.run(oat(scope), window(plan, engine.world.rank, images_BCHW, labels_B), len(labels_B))
        replica.step(LEARNING_RATE)
        found[f"{scope}/{span}"] = counts.total()
        replica.close()
    return found


def not_finite(engine: Engine) -> str | None:
    """What a step with a gradient that is not finite says; DDP takes it, and its weights say it afterwards."""
    plan = layout_of(engine, "device", "micro", None, GROUP)
    replica = prepare(engine, plan)
    step = WindowStep(replica, lambda batch: batch.images_BHWC * float("nan"), "micro", lambda loss: None)
    images_BCHW, labels_B = batches()[0]
    said = None
    try:
        step.run(oat("device"), window(plan, engine.world.rank, images_BCHW, labels_B), len(labels_B))
        replica.step(LEARNING_RATE)
    except TrainingError as error:
        said = str(error)
    finite = replica.is_finite()
    replica.close()
    return said if finite else f"weights are not finite ({said})"


def partitions(engine: Engine) -> dict[str, Any]:
    """Elements of weights, masters and momentum that this rank holds, after a step, and whether masters are copies."""
    plan = layout_of(engine, "device", "micro", None, GROUP)
    replica = prepare(engine, plan)
    assert isinstance(replica, Zero)
    images_BCHW, labels_B = batches()[0]
    step = WindowStep(replica, lambda batch: batch.images_BHWC, "micro", lambda loss: None)
    step.run(oat("device"), window(plan, engine.world.rank, images_BCHW, labels_B), len(labels_B))
    replica.step(LEARNING_RATE)
    zero = replica.optimizer
    masters = zero.fp32_partitioned_groups_flat if replica.stage == 3 else zero.single_partition_of_fp32_groups
    whole = sum(shape.numel() for shape in replica._shapes.values())
    held = {
        "whole": whole,
        "optimizer": type(zero.optimizer).__name__,
        "masters": sum(master.numel() for master in masters),
        "momentum": sum(zero.optimizer.state[master]["momentum_buffer"].numel() for master in masters),
        "weights": sum(
            (parameter.ds_tensor if replica.stage == 3 else parameter).numel()
            for parameter in replica.network.parameters()
        ),
    }
    weights = {
        (parameter.ds_tensor if replica.stage == 3 else parameter).untyped_storage().data_ptr()
        for parameter in replica.network.parameters()
    }
    held["shared"] = all(master.untyped_storage().data_ptr() in weights for master in masters)
    replica.close()
    return held


def bf16(engine: Engine) -> dict[str, float]:
    """Distances to one process under the same autocast, for cross-entropy and for OAT, under the same split."""
    start = parameters(small_vit().state_dict())
    found = {}
    for span, micro in (("micro", None), ("step", 4)):
        plan = layout_of(engine, "global", span, micro, GROUP)
        objectives: dict[str, Objective] = {"cross-entropy": CrossEntropy(), "attached": oat("global")}
        objectives["detached"] = oat("global", attached=False)
        for name, objective in objectives.items():
            theta = train(engine, plan, objective, span)
            if not engine.world.is_main:
                continue
            if name == "cross-entropy":
                expected = reference(
                    lambda count: [], lambda z, y, sets: nn.functional.cross_entropy(z, y), engine.precision
                )
            else:
                expected = oat_reference(
                    lambda count: [list(range(count))], "probabilities", name == "attached", engine.precision
                )
            found[f"{span}/{name}"] = distance(theta, expected, start)
    return found
