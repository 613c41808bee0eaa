"""End to end: training steps fed by our loader, against the same steps on a tensor in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.data_measure import Side
from benchmarks.data_ours import epoch, loader
from benchmarks.data_sets import ImageSet
from oat_dist import OATLoss
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.images.batchwise import flip_images, pad_crop_images, pad_crop_offsets
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise, flips
from oat_dist.data.plan import EpochOrder
from oat_dist.models import Lightweight

__all__ = ["IN_MEMORY", "LOADED", "STEP_BATCH", "feeds", "step_sides"]

LOADED = "our loader, decoded cache"
IN_MEMORY = "a tensor in memory"
STEP_BATCH = 32  # of configs/cifar10/lightweight.yaml

Feed = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> its batches: (B, H, W, 3) uint8 and (B,) int64


def feeds(images: ImageSet, batch: int) -> tuple[dict[str, Feed], Callable[[], None]]:
    """The same batches from our loader and from a tensor; and what closes the loader."""
    train = loader(images, decoded=True, batch=batch)
    everything = BatchBuilder(images.shards, ImagePipeline(images.size)).build(np.arange(len(images.shards)))
    pixels_NHWC, labels_N = everything.images_BHWC.numpy(), everything.labels_B.numpy()
    padding = images.size // 8

    def from_loader(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((each.images_BHWC, each.labels_B) for each in epoch(train, number))

    def from_memory(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order_N = EpochOrder(len(labels_N), 0, number).ids(0, len(labels_N))
        for start in range(0, len(labels_N) - batch + 1, batch):
            ids_B = order_N[start : start + batch]
            images_BHWC = np.take(pixels_NHWC, ids_B, axis=0)
            flip_images(images_BHWC, flips(ids_B, 0, number))
            pad_crop_images(images_BHWC, pad_crop_offsets(ids_B, 0, number, padding), padding)
            yield torch.from_numpy(images_BHWC), torch.from_numpy(labels_N[ids_B])

    return {LOADED: from_loader, IN_MEMORY: from_memory}, train.builder.close


def step_sides(images: ImageSet, batch: int = STEP_BATCH) -> list[Side]:
    """An epoch of OAT steps of the lightweight net a pass; each side has a net of its own, from the same weights."""
    both, close = feeds(images, batch)
    return [
        Side(LOADED, _training(both[LOADED], len(images.shards.classes)), close, calls=1),
        Side(IN_MEMORY, _training(both[IN_MEMORY], len(images.shards.classes)), calls=1),
    ]


def _training(feed: Feed, classes: int) -> Callable[[], int]:
    torch.manual_seed(0)
    model, criterion = Lightweight(classes), OATLoss(classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    normalise = Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.device("cpu"))
    numbers = itertools.count()

    def run() -> int:
        count = 0
        for images_BHWC, labels_B in feed(next(numbers)):
            loss = criterion(model(normalise(images_BHWC)), labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(labels_B)
        return count

    return run
