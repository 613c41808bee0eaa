"""Step time with anchors over all ranks (scope global, one collective) over that with anchors of each rank (device).

    make bench        (or: torchrun --standalone --nproc_per_node 2 benchmarks/scope.py [--image-size 224] ...)

Both objectives step the same network in turn, in the same processes, from barrier to barrier; the order changes from
repeat to repeat. Printed is the median of the ratios by wall time, with the smallest and the largest. The last line
compares device with itself: what lies within its range is noise. Small images, so that the collective weighs more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from oat_dist import OATLoss
from oat_dist.batch import Batch
from oat_dist.engine import Engine, start_engine
from oat_dist.models import build_model
from oat_dist.objectives import OAT
from oat_dist.optim import build_optimizer
from oat_dist.window_step import WindowStep

CLASSES = 101  # UCF-101, the paper's largest
SIDES = {"device": "device", "global": "global", "device again": "device"}


def seconds(engine: Engine, asked: argparse.Namespace) -> list[dict[str, float]]:
    """Of a step of each side, repeat by repeat; the same on every rank, up to the barrier."""
    world = engine.world
    torch.manual_seed(0)
    network = build_model(asked.model, CLASSES, image_size=asked.image_size)
    replica = engine.prepare(network, build_optimizer(network, "sgd", 1.0))
    size = asked.batch_size // world.size
    images_BCHW = torch.randn(size, 3, asked.image_size, asked.image_size, device=world.device)
    labels_B = torch.randint(0, CLASSES, (size,))
    replica.warm_up(images_BCHW)
    step = WindowStep(replica, lambda batch: batch.images_BHWC, "micro", lambda loss: None)
    objectives = {name: OAT(OATLoss(CLASSES, scope=scope)) for name, scope in SIDES.items()}
    found = []
    for repeat in range(asked.repeats + 1):
        taken = {}
        for name in list(SIDES) if repeat % 2 else reversed(SIDES):
            world.all_agree(True)
            started = time.perf_counter()
            step.run(objectives[name], [Batch(images_BCHW, labels_B, labels_B)], size * world.size)
            replica.step(1e-5)
            world.all_agree(True)  # waits for the GPU too
            taken[name] = time.perf_counter() - started
        if repeat:  # the first one warms up
            found.append(taken)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of model.name (default resnet18)")
    parser.add_argument(
        "--image-size",
        type=int,
        default=64,
        help="pixels a side (default 64)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="over all ranks (default 32, the paper's)")
    parser.add_argument("--repeats", type=int, default=40, help="counted steps of each side (default 40)")
    asked = parser.parse_args()
    engine = start_engine(name="ddp", precision="no", threads=1)
    found = seconds(engine, asked)
    if engine.world.is_main:
        step = statistics.median(taken["device"] for taken in found)
        print(
            f"\nstep, {asked.model}, {asked.image_size}x{asked.image_size}, batch {asked.batch_size}, "
            f"{engine.world.size} ranks on {engine.world.device.type}: anchors of each rank {step:.3f} s (= 1)"
        )
        for name in list(SIDES)[1:]:
            ratios = [taken[name] / taken["device"] for taken in found]
            print(f"  {name:<34} {statistics.median(ratios):6.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
