"""Our loader, one thread; the decode-only ceiling; single samples at random."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch

from benchmarks.data_measure import Side
from benchmarks.data_sets import SHORT_SIDE, ImageSet
from oat_dist.batch import Batch
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.decoded_cache import open_decoded_cache
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import ShardSet
from oat_dist.data.loader import TrainLoader
from oat_dist.data.plan import Layout
from oat_dist.data.storage import ShardReader

__all__ = ["CACHED", "CEILING", "OURS", "READ", "ceiling", "epoch", "loader", "our_sides", "pipeline", "read_side"]

OURS = "ours, uint8"
FLOATS = "ours, and float on the CPU"
CACHED = "ours, decoded cache (RAM)"
SHRUNK = f"ours, packed --short-side {SHORT_SIDE}"
CEILING = "decode only (simplejpeg)"
READ = "ours, in random order"


def pipeline(images: ImageSet) -> ImagePipeline:
    return ImagePipeline(images.size, images.crop, images.augment, seed=0)


def loader(
    images: ImageSet, shards: ShardSet | None = None, *, decoded: bool = False, batch: int | None = None
) -> TrainLoader:
    """One decoding thread.

    Args:
        shards: of the set, but for those that hold its files as they are.
        decoded: with a cache of decoded images in memory.
        batch: instead of the set's own.
    """
    steps, shards = pipeline(images), shards or images.shards
    cache = open_decoded_cache("ram", shards, steps) if decoded else None
    layout = Layout(batch or images.batch, 1, drop_last=True)
    return TrainLoader(BatchBuilder(shards, steps, decoded=cache), layout, 0, 0, workers=1, prefetch=2)


def epoch(train: TrainLoader, number: int) -> Iterator[Batch]:
    steps = train.steps_per_epoch
    for window in train.windows(number * steps, (number + 1) * steps):
        yield from window.batches


def our_sides(images: ImageSet) -> list[Side]:
    """As it comes, normalised to float besides (the device's work), from the decoded cache, from shrunk shards."""
    normalise = Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.device("cpu"))

    def side(name: str, train: TrainLoader, *, floats: bool = False) -> Side:
        numbers = itertools.count()

        def run() -> int:
            count = 0
            for batch in epoch(train, next(numbers)):
                if floats:
                    normalise(batch.images_BHWC)
                count += len(batch)
            return count

        return Side(name, run, train.builder.close)

    sides = [
        side(OURS, loader(images)),
        side(FLOATS, loader(images), floats=True),
        side(CACHED, loader(images, decoded=True)),
    ]
    return sides if images.shrunk is None else [*sides, side(SHRUNK, loader(images, images.shrunk))]


def ceiling(images: ImageSet) -> Side:
    """libjpeg-turbo decodes every file in full, out of memory; nothing else."""
    reader = ShardReader(images.shards)
    files = [reader.read(i) for i in range(images.images)]
    reader.close()

    def run() -> int:
        for data in files:
            simplejpeg.decode_jpeg(data, colorspace="RGB")
        return len(files)

    return Side(CEILING, run)


def read_side(images: ImageSet) -> Side:
    """The bytes of single samples, in random order."""
    reader = ShardReader(images.shards)
    ids = np.random.default_rng(1).permutation(len(images.shards)).tolist()

    def run() -> int:
        for sample_id in ids:
            reader.read(sample_id)
        return len(ids)

    return Side(READ, run, reader.close)
