"""What anchors cost: training and testing with OAT, and with anchors of the classes, over cross-entropy.

    make bench-anchors DATA=packed/cifar10     (or: python benchmarks/anchors.py packed/cifar10 [--network resnet18])

The paper's section 3.5 has these times for UCF-101, ResNet-18, one RTX 3090. All sides take the same images, decoded
once and held in memory, in turn and in one process; their order changes from repeat to repeat. Seconds are CPU time of
one thread, or the time until a GPU has done the work. A ratio is taken within a repeat; printed are the medians, with
the smallest and the largest ratio. Class anchors: see class_anchors.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.class_anchors import ClassAnchors, class_anchors, nearest_anchor_scores
from oat_dist import OATLoss
from oat_dist.batch import Batch
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import open_split
from oat_dist.data.plan import EpochOrder
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import DataError, run_command
from oat_dist.evaluate import Outputs, collect
from oat_dist.models import build_model
from oat_dist.objectives import OAT, CrossEntropy, Objective, oat_scores
from oat_dist.optim import build_optimizer
from oat_dist.window_step import WindowStep

__all__ = ["Measured", "main", "measure", "rank"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROSS_ENTROPY = "cross-entropy"
# the paper's seconds over those of cross-entropy: 13.956 / 14.943, 4.391 / 4.219, 9.116 / 4.219
PAPER_TRAIN = {"OAT": 0.934}
PAPER_TEST = {"OAT, batch": 1.041, "class anchors, nearest": 2.161}
LEARNING_RATE = 1e-4  # the weights move little, so that no side leaves the range of usual numbers

Side = Callable[[], object]
Scores = Callable[[Tensor], Tensor]


@dataclass
class Measured:
    """Seconds by side, one for each repeat; those of computing the class anchors; and what each test found right."""

    train: dict[str, list[float]]
    test: dict[str, list[float]]
    beforehand: float
    correct: dict[str, int]


def measure(engine: Engine, asked: argparse.Namespace) -> Measured:
    """Time every side.

    Raises:
        DataError: a split that cannot be opened, or of too few images for every class to be among them.
    """
    world = engine.world
    train, classes = _in_memory(asked.data / "train", asked.images, asked)
    test, _ = _in_memory(asked.data / "test", asked.test_images, asked)
    num_test = sum(map(len, test))
    torch.manual_seed(0)
    network = build_model(asked.network, classes, image_size=asked.image_size)
    replica = engine.prepare(network, build_optimizer(network, "sgd", LEARNING_RATE))
    normalise = Normalise(MEAN, STD, world.device)
    images = partial(_images, normalise)
    replica.warm_up(images(train[0]))
    step = WindowStep(replica, images, "micro", lambda loss: None)

    def forwarded(batches: list[Batch]) -> Outputs:
        network.eval()
        outputs = collect(lambda batch: network(images(batch)), batches, sum(map(len, batches)), world)
        network.train()
        assert outputs is not None
        return outputs

    def epoch(objective: Objective) -> None:
        for batch in train:
            step.run(objective, [batch], len(batch))
            replica.step(LEARNING_RATE)

    started = _now(world.device)
    outputs = forwarded(train)
    anchors_KC = class_anchors(outputs.logits_NC, outputs.labels_N)
    beforehand = _now(world.device) - started

    order_N = torch.from_numpy(EpochOrder(num_test, 0, 0).ids(0, num_test).copy())
    tests: dict[str, Scores] = {
        CROSS_ENTROPY: lambda logits_NC: logits_NC,
        "OAT, batch": lambda logits_NC: _in_groups(logits_NC, order_N, asked.batch_size),
        "OAT, single": lambda logits_NC: oat_scores(logits_NC, "probabilities", 0.0, 1),
        "class anchors, nearest": lambda logits_NC: nearest_anchor_scores(logits_NC, anchors_KC),
        "the same, one image at a time": lambda logits_NC: torch.cat(
            [nearest_anchor_scores(logits_1C, anchors_KC) for logits_1C in logits_NC.split(1)]
        ),
    }
    objectives: dict[str, Objective] = {
        CROSS_ENTROPY: CrossEntropy(),
        "OAT": OAT(OATLoss(classes)),
        "class anchors": ClassAnchors(anchors_KC.float().to(world.device)),
    }
    correct: dict[str, int] = {}

    def tested(name: str) -> None:
        outputs = forwarded(test)
        found_N = tests[name](outputs.logits_NC).argmax(dim=1)
        correct[name] = int((found_N == outputs.labels_N).sum())

    trained = _seconds({name: partial(epoch, one) for name, one in objectives.items()}, asked.repeats, world.device)
    times = _seconds({name: partial(tested, name) for name in tests}, asked.repeats, world.device)
    return Measured(trained, times, beforehand, correct)


def _in_memory(folder: Path, most: int, asked: argparse.Namespace) -> tuple[list[Batch], int]:
    """Batches of images drawn at random, and the number of classes."""
    shards = open_split(folder)
    count = min(most, shards.num_samples)
    builder = BatchBuilder(shards, ImagePipeline(asked.image_size))
    drawn = EpochOrder(shards.num_samples, 0, 0).ids(0, count)
    batches = []
    for start in range(0, count, asked.batch_size):
        batch = builder.build(drawn[start : start + asked.batch_size], 0)
        ids_B = torch.arange(start, start + len(batch))  # in their order here, as `collect` wants all ids
        batches.append(Batch(batch.images_BHWC, batch.labels_B, ids_B))
    builder.close()
    return batches, len(shards.classes)


def _images(normalise: Normalise, batch: Batch) -> Tensor:
    return normalise(batch.images_BHWC)


def _in_groups(logits_NC: Tensor, order_N: Tensor, size: int) -> Tensor:
    """The protocol `batch`: scores under the anchors of groups of a permutation."""
    scores_NC = torch.empty_like(logits_NC)
    scores_NC[order_N] = oat_scores(logits_NC[order_N], "probabilities", 0.0, size)
    return scores_NC


def _seconds(sides: dict[str, Side], repeats: int, device: torch.device) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in list(sides) if repeat % 2 else reversed(sides):
            started = _now(device)
            sides[name]()
            if repeat:  # the first one warms up
                found[name].append(_now(device) - started)
    return found


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def table(title: str, found: dict[str, list[float]], paper: dict[str, float]) -> list[str]:
    lines = [f"{title:<32} {'seconds':>8}  {'over cross-entropy':<24} {'the paper':>9}"]
    for name, seconds in found.items():
        ratios = [one / base for one, base in zip(seconds, found[CROSS_ENTROPY], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        told = f"{paper[name]:.3f}" if name in paper else ""
        lines.append(f"{name:<32} {statistics.median(seconds):>8.3f}  {ratio:<24} {told:>9}".rstrip())
    return lines


def rank(*argv: str) -> dict[str, Any]:
    """What `measure` finds, for the arguments of the command."""
    return asdict(_measured(_parser().parse_args(argv))[0])


def _measured(asked: argparse.Namespace) -> tuple[Measured, torch.device]:
    if min(asked.batch_size, asked.images, asked.test_images, asked.repeats) < 1:
        raise DataError("--batch-size, --images, --test-images and --repeats must be at least 1")
    engine = start_engine(name="ddp", precision="no", threads=1)
    found = measure(engine, asked)
    engine.close()
    return found, engine.world.device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a packed set with the splits train and test")
    parser.add_argument("--network", default="lightweight", help="a name of model.name (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (default %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="of training, and of anchors in testing (default 32)"
    )
    parser.add_argument("--images", type=int, default=3200, help="of train, in an epoch (default %(default)s)")
    parser.add_argument("--test-images", type=int, default=3200, help="of test (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="counted repeats of each side (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(argv)
    return run_command(lambda: run(asked))


def run(asked: argparse.Namespace) -> int:
    found, device = _measured(asked)
    where = "one CPU thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"{asked.network}, {asked.image_size}x{asked.image_size}, batch {asked.batch_size}; torch {torch.__version__}, "
        f"{where}; medians of {asked.repeats} repeats\n"
    )
    for line in table("an epoch of training", found.train, PAPER_TRAIN):
        print(line)
    print(f"{'class anchors, computed before':<32} {found.beforehand:>8.3f}  once\n")
    for line in table("a test", found.test, PAPER_TEST):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
