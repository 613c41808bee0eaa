"""The memory of batches is used again, and never while somebody still looks at it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from oat_dist.data.builder import BatchBuilder
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.index import ShardSet

SQUASH = ImagePipeline(16)


@pytest.fixture
def builder(digits: dict[str, ShardSet]) -> Iterator[BatchBuilder]:
    built = BatchBuilder(digits["train"], SQUASH)
    yield built
    built.close()


alone = builder  # another one, whose memory nobody has used


def test_the_memory_of_a_batch_is_used_again_once_it_is_gone(builder: BatchBuilder) -> None:
    batch = builder.build(np.arange(32))
    place, first = batch.images_BHWC.data_ptr(), batch.images_BHWC.clone()
    rows = batch.images_BHWC[3:].permute(0, 3, 1, 2)  # what is left of a batch holds all of it
    del batch
    other = builder.build(np.arange(100, 132))
    assert other.images_BHWC.data_ptr() != place
    assert torch.equal(rows, first[3:].permute(0, 3, 1, 2))
    pixels = rows.numpy()  # also where no tensor is left
    del rows, other
    second = builder.build(np.arange(200, 216))
    assert np.array_equal(pixels, first[3:].permute(0, 3, 1, 2).numpy())
    del pixels
    third = builder.build(np.arange(32))
    assert third.images_BHWC.data_ptr() == place and torch.equal(third.images_BHWC, first)
    assert second.images_BHWC.untyped_storage().nbytes() == 16 * 16 * 16 * 3  # a part of a block shows no more of it


def test_a_larger_batch_takes_new_memory(builder: BatchBuilder, alone: BatchBuilder) -> None:
    builder.build(np.arange(8))
    large = builder.build(np.arange(64)).images_BHWC
    assert torch.equal(large, alone.build(np.arange(64)).images_BHWC)


def test_threads_share_no_memory(builder: BatchBuilder, alone: BatchBuilder) -> None:
    """Batches that are kept, and others that are dropped meanwhile in the same threads, come out as planned."""
    starts = np.random.default_rng(0).integers(0, 1000, 200).tolist()

    def build(start: int) -> torch.Tensor | None:
        images_BHWC = builder.build(np.arange(start, start + 16)).images_BHWC
        return images_BHWC if start % 3 else None

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(build, starts))
    for start, found in zip(starts, kept, strict=True):
        assert found is None or torch.equal(found, alone.build(np.arange(start, start + 16)).images_BHWC)
    del kept, found
    gc.collect()
    assert len(builder._unused) <= sum(start % 3 != 0 for start in starts) + 8  # no more than were in use at once
