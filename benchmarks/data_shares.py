"""Where the time of our loader goes, part by part: each part alone on the whole set, in turn with the loader itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from benchmarks.data_measure import Side, measure
from benchmarks.data_ours import loader, pipeline
from benchmarks.data_sets import ImageSet
from oat_dist.data.builder import BatchBuilder

__all__ = ["shares"]


def shares(images: ImageSet, repeats: int) -> dict[str, float]:
    """Microseconds of CPU an image: reading it, drawing its box, decoding and cropping, augmenting; and what is left of
    the whole: making batches and handing them from thread to thread."""
    steps, index = pipeline(images), images.shards.index
    ids_N = np.arange(images.images)
    builder, train = BatchBuilder(images.shards, steps), loader(images)
    read_one = builder.reader.read
    files = [read_one(i) for i in ids_N.tolist()]
    boxes_N4 = steps.boxes(ids_N, index.width[ids_N], index.height[ids_N], 0)
    batches = ids_N.reshape(-1, images.batch)
    pixels_BHWC = builder.build(batches[0]).images_BHWC.numpy()

    def read() -> None:
        for sample_id in ids_N.tolist():
            read_one(sample_id)

    def boxes() -> None:
        for ids_B in batches:
            steps.boxes(ids_B, index.width[ids_B], index.height[ids_B], 0)

    def decode() -> None:
        for at, data in enumerate(files):
            steps.read(data, None if boxes_N4 is None else boxes_N4[at], pixels_BHWC[at % images.batch])

    def augment() -> None:
        for ids_B in batches:
            steps.finish(pixels_BHWC, ids_B, 0)

    def whole() -> None:
        for _ in train.windows(0, train.steps_per_epoch):
            pass

    def side(name: str, work: Callable[[], None]) -> Side:
        def run() -> int:
            work()
            return len(ids_N)

        return Side(name, run)

    parts = {"read": read, "boxes": boxes, "decode and crop": decode, "augment": augment, "whole": whole}
    timings = measure([side(name, work) for name, work in parts.items()], repeats)
    found = {name: statistics.median(timing.cpu) for name, timing in timings.items()}
    builder.close()
    train.builder.close()
    total = found.pop("whole")
    return {**found, "batches, threads": total - sum(found.values())}
