"""The order in windows of shards: an exact permutation, a pure function, shards that are used together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oat_dist.data import windows as windows_module
from oat_dist.data.hashing import keyed_hash_int
from oat_dist.data.index import Index, Manifest, ShardInfo, ShardSet
from oat_dist.data.plan import EpochOrder, Layout, ShardWindows
from oat_dist.data.remote.shard_cache import ShardCache
from oat_dist.errors import ConfigError, DataError

modest = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def split(
    counts: list[int], *, labels: list[int] | None = None, location: str = "set", limit: int | None = None
) -> ShardSet:
    """A split of shards with so many samples each, in random order of their ids."""
    number = sum(counts)
    shard = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    label = shard * 0 if labels is None else np.array(labels)[shard]
    zeros = np.zeros(number, dtype=np.int64)
    rows = {"shard": shard, "offset": zeros, "length": zeros, "label": label, "width": zeros, "height": zeros}
    index = Index.from_rows(rows, [f"{i}" for i in range(number)])
    manifest = Manifest(
        split="train",
        source="test",
        seed=0,
        classes=["ant", "bee", "cat", "dog"],
        class_counts=np.bincount(label, minlength=4).tolist(),
        num_samples=number,
        num_bytes=0,
        image_sizes={},
        shards=[ShardInfo(f"{k}.tar", count, 10**9, "") for k, count in enumerate(counts)],
        index={"file": "index.safetensors", "size": 0, "sha256": ""},
    )
    return ShardSet(Path(location), manifest, index, "0" * 64, location, ShardCache("cache", limit))


def order_of(shards: ShardSet, window: int, *, seed: int = 7, epoch: int = 3) -> np.ndarray:
    return EpochOrder(len(shards), seed, epoch, ShardWindows(shards, window)).ids(0, len(shards))


def by_hand(shards: ShardSet, window: int, seed: int, epoch: int) -> list[int]:
    """The order as the module's text describes it, one sample at a time."""
    number = len(shards.manifest.shards)
    order = sorted(range(number), key=lambda shard: keyed_hash_int(shard, seed, epoch, 101))
    cuts = -(-number // window)
    ids: list[int] = []
    for k in range(cuts):
        used = order[k * number // cuts : (k + 1) * number // cuts]
        inside = np.flatnonzero(np.isin(shards.index.shard, used)).tolist()
        ids += sorted(inside, key=lambda sample: keyed_hash_int(sample, seed, epoch, 102))
    return ids


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 14), st.integers(0, 2**64 - 1))
@modest
def test_an_epoch_is_every_sample_once_window_after_window(counts: list[int], window: int, seed: int) -> None:
    shards = split(counts)
    order = order_of(shards, window, seed=seed)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(len(shards)))
    assert order.tolist() == by_hand(shards, window, seed, 3)


def test_windows_are_even_and_their_samples_mixed() -> None:
    shards = split([100] * 10)
    order = order_of(shards, 4)
    used = shards.index.shard[order]
    edges = [0, 300, 600, 1000]  # ten shards in three windows
    groups = [set(used[start:stop].tolist()) for start, stop in pairwise(edges)]
    assert [len(group) for group in groups] == [3, 3, 4] and set.union(*groups) == set(range(10))
    for start, stop in pairwise(edges):
        first_half = np.bincount(used[start : (start + stop) // 2], minlength=10)
        assert np.all((first_half == 0) | (np.abs(first_half - 50) < 25))  # of each shard about half
    # Not so if each shard came by itself (the control of the line above).
    alone = shards.index.shard[order_of(shards, 1)]
    assert len(set(alone[:100].tolist())) == 1


@given(st.integers(1, 6), st.integers(1, 50), st.data())
@modest
def test_slices_agree_with_the_whole_from_any_position(window: int, stretch: int, data: st.DataObject) -> None:
    """However much is computed at a time, by whoever starts wherever."""
    shards = split([7, 3, 9, 5, 8, 1])
    whole = order_of(shards, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "STRETCH", stretch)
        patch.setattr(windows_module, "_CHUNK", data.draw(st.integers(1, 40)))
        resumed = EpochOrder(len(shards), 7, 3, ShardWindows(shards, window))
        for _ in range(4):
            start = data.draw(st.integers(0, len(shards)))
            stop = data.draw(st.integers(start, len(shards)))
            assert resumed.ids(start, stop).tolist() == whole[start:stop].tolist()


def test_the_order_is_the_same_on_any_number_of_ranks() -> None:
    shards = split([20, 30, 25, 10, 15])
    whole = order_of(shards, 2).tolist()
    for world in (1, 2, 3):
        layout = Layout(16, world, micro_batch_size=4)
        ranks = [EpochOrder(100, 7, 3, ShardWindows(shards, 2)) for _ in range(world)]
        found = []
        for step in range(layout.steps(100)):
            start, stop = layout.batch_range(step, 100)
            for parts in layout.deal(stop - start):
                for order, part in zip(ranks, parts, strict=True):
                    found += order.ids(start + part.start, start + part.stop).tolist()
        assert found == whole


def test_epochs_and_seeds_differ_in_shards_and_samples() -> None:
    shards = split([5] * 8)
    orders = {tuple(order_of(shards, 3, seed=seed, epoch=epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64
    firsts = [int(shards.index.shard[order_of(shards, 1, epoch=epoch)[0]]) for epoch in range(60)]
    assert set(firsts) == set(range(8))
    assert len({tuple(order_of(split([6]), 1, epoch=epoch)) for epoch in range(20)}) > 15


def test_frozen_values() -> None:
    """A run resumed by a later version must see the same order: these numbers may never change."""
    assert order_of(split([2, 3, 1, 4]), 2, seed=0, epoch=0).tolist() == [6, 9, 3, 8, 1, 7, 0, 2, 4, 5]


def test_what_comes_up() -> None:
    shards = split([4] * 6)
    windows = ShardWindows(shards, 2)
    used = shards.index.shard
    order, after = order_of(shards, 2), order_of(shards, 2, epoch=4)
    for position in range(24):
        upcoming = windows.upcoming(7, 3, position).tolist()
        first = position // 8 * 8
        assert set(upcoming[:2]) == set(used[order[first : first + 8]].tolist())
        following = order[first + 8 : first + 16] if first < 16 else after[:8]
        assert set(upcoming[2:]) == set(used[following].tolist())


def test_windows_that_lack_classes_are_told() -> None:
    """Shards 0 to 5 hold one class each; the fourth class has no sample anywhere and is nobody's fault."""
    shards = split([5] * 6, labels=[0, 1, 2, 0, 1, 2])
    windows = ShardWindows(shards, 2)
    order = order_of(shards, 2, seed=1, epoch=0)
    lacking = windows.lacking(1, 0)
    for window in range(3):
        present = set(shards.index.label[order[window * 10 : window * 10 + 10]].tolist())
        assert lacking[window].tolist() == sorted({0, 1, 2} - present)
    [note] = windows.notes(1)
    assert note.startswith("note: data.shuffle_shards=2: 3 of 3 windows of the first epoch lack classes (window 1: '")
    assert ShardWindows(shards, 6).lacking(1, 0) == {} and ShardWindows(shards, 6).notes(1) == []


def test_a_cache_too_small_for_two_windows_is_told() -> None:
    shards = split([5] * 6, location="http://host/set", limit=5 * 10**9)
    assert ShardWindows(shards, 2).notes(0) == []
    [note] = ShardWindows(shards, 3).notes(0)
    assert "data.shuffle_shards=3 needs 6 GB of cache for a window and the next, data.cache_gb is 5" in note
    assert ShardWindows(split([5] * 6, limit=10**9), 3).notes(0) == []  # local shards need no cache


def test_little_is_kept_and_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "STRETCH", 40)
    shards = split([20] * 20)
    windows = ShardWindows(shards, 2)
    order = EpochOrder(400, 7, 3, windows)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda start: order.ids(start, start + 10), range(0, 400, 10)))
    assert np.concatenate(found).tolist() == order_of(shards, 2).tolist()
    assert len(windows._stretches) <= 3 and sum(map(len, windows._stretches.values())) <= 120


def test_what_does_not_belong_together_is_refused() -> None:
    shards = split([5, 6])
    with pytest.raises(ConfigError, match=r"data.shuffle_shards=0: a window needs at least 1 shard; null shuffles all"):
        ShardWindows(shards, 0)
    shards.manifest.shards[0] = ShardInfo("0.tar", 6, 1, "")
    with pytest.raises(DataError, match=r"^set: manifest and index do not agree on which samples lie in which shard"):
        ShardWindows(shards, 1)
    shards.manifest.shards[1] = ShardInfo("1.tar", 5, 1, "")
    with pytest.raises(DataError, match="do not agree"):
        ShardWindows(shards, 1).ids(0, 0, 0, 11)
    shards = split([5, 6])
    shards.index.shard[3] = 2
    with pytest.raises(DataError, match="do not agree"):
        ShardWindows(shards, 1).ids(0, 0, 0, 1)
