"""The data order as pure functions: the world size is an argument, so no process is started."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oat_dist.data import plan
from oat_dist.data.plan import EpochOrder, Layout, Part, fingerprint, keyed_hash, keyed_hash_int
from oat_dist.errors import ConfigError

DIGEST = "0123456789abcdef" * 4
SEEDS = st.integers(0, 2**64 - 1)
modest = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout that is allowed, and a number of samples for it."""
    world = draw(st.integers(1, 8))
    unit = draw(st.sampled_from([1, 1, 2, 3, 8, 32]))
    units = draw(st.integers(world, world + 30))
    batch_size = (units - 1) * unit + draw(st.integers(1, unit))
    micro_batch_size = draw(st.none() | st.integers(1, 6).map(lambda k: k * unit))
    drop_last = draw(st.booleans())
    least = batch_size if drop_last else (world - 1) * unit + 1
    num_samples = draw(st.integers(least, least + 3 * batch_size))
    return Layout(batch_size, world, micro_batch_size, unit, drop_last), num_samples


def global_batches(layout: Layout, num_samples: int) -> Iterator[tuple[int, int, list[list[Part]]]]:
    """(start, stop, parts) of every global batch of an epoch."""
    for step in range(layout.steps(num_samples)):
        start, stop = layout.batch_range(step, num_samples)
        yield start, stop, layout.deal(stop - start)


def pieces(layout: Layout, order: EpochOrder) -> list[tuple[int, np.ndarray]]:
    """(first position, ids) of every part of an epoch, by step, then micro-batch, then rank."""
    return [
        (start + part.start, order.ids(start + part.start, start + part.stop))
        for start, _, micro_batches in global_batches(layout, order.num_samples)
        for parts in micro_batches
        for part in parts
    ]


def total_fingerprint(layout: Layout, order: EpochOrder, digest: str = DIGEST) -> int:
    return sum(fingerprint(order.epoch, start, ids, digest) for start, ids in pieces(layout, order)) % 2**64


@given(layouts(), SEEDS, st.integers(0, 1000))
@modest
def test_an_epoch_is_every_sample_once_in_the_order_of_the_seed(
    case: tuple[Layout, int], seed: int, epoch: int
) -> None:
    layout, num_samples = case
    order = EpochOrder(num_samples, seed, epoch)
    consumed = num_samples - num_samples % layout.batch_size if layout.drop_last else num_samples
    dealt = np.concatenate([ids for _, ids in pieces(layout, order)])
    assert dealt.tolist() == order.ids(0, consumed).tolist()
    # what is missing is exactly the tail of the order, and nothing comes twice
    tail = order.ids(consumed, num_samples)
    assert sorted([*dealt.tolist(), *tail.tolist()]) == list(range(num_samples))


@given(layouts())
@modest
def test_global_batches_are_consecutive_slices(case: tuple[Layout, int]) -> None:
    layout, num_samples = case
    batches = list(global_batches(layout, num_samples))
    assert [start for start, _, _ in batches] == [k * layout.batch_size for k in range(len(batches))]
    assert all(stop - start == layout.batch_size for start, stop, _ in batches[:-1])
    last = batches[-1][1] - batches[-1][0]
    assert 1 <= last <= layout.batch_size and (last == layout.batch_size or not layout.drop_last)


@given(layouts())
@modest
def test_a_global_batch_is_dealt_whole_even_and_within_bounds(case: tuple[Layout, int]) -> None:
    layout, num_samples = case
    unit = layout.unit
    for start, stop, micro_batches in global_batches(layout, num_samples):
        count = stop - start
        parts = [part for row in micro_batches for part in row]
        assert parts[0].start == 0 and parts[-1].stop == count
        assert all(a.stop == b.start for a, b in pairwise(parts))  # contiguous, in order, over all micro-batches
        assert all(len(row) == layout.world for row in micro_batches)
        for part in parts:  # groups lie at multiples of their size, and are never cut
            assert part.start % unit == 0 or len(part) == 0
            assert part.stop % unit == 0 or part.stop == count
            assert layout.micro_batch_size is None or len(part) <= layout.micro_batch_size
        by_rank = [[-(-len(row[rank]) // unit) for row in micro_batches] for rank in range(layout.world)]
        for row in zip(*by_rank, strict=True):
            assert max(row) - min(row) <= 1
        totals = [sum(units) for units in by_rank]
        assert max(totals) - min(totals) <= 1
        # a rank lacks samples only in the last micro-batch; never for a whole full batch
        assert all(units > 0 for rank in by_rank for units in rank[:-1])
        assert any(units > 0 for units in by_rank[0])
        if count == layout.batch_size:
            assert min(totals) > 0


@given(layouts())
@modest
def test_no_more_micro_batches_than_needed(case: tuple[Layout, int]) -> None:
    layout, _ = case
    micro_batches = layout.deal(layout.batch_size)
    units = -(-layout.batch_size // layout.unit)
    largest_share = min(-(-units // layout.world) * layout.unit, layout.batch_size)
    bound = layout.micro_batch_size
    assert len(micro_batches) == (1 if bound is None else -(-largest_share // bound))


@given(layouts(), st.integers(1, 40))
@modest
def test_whole_shares_are_contiguous_and_cut_evenly(case: tuple[Layout, int], micro_batch_size: int) -> None:
    """Anchor span "step": the shares are those of one micro-batch; where they are cut does not matter to groups."""
    layout, num_samples = case
    shares = Layout(layout.batch_size, layout.world, micro_batch_size, layout.unit, layout.drop_last, whole_shares=True)
    whole = Layout(layout.batch_size, layout.world, None, layout.unit, layout.drop_last)
    for start, stop, micro_batches in global_batches(shares, num_samples):
        [expected] = whole.deal(stop - start)
        for rank, share in enumerate(expected):
            parts = [parts[rank] for parts in micro_batches]
            assert (parts[0].start, parts[-1].stop) == (share.start, share.stop)
            assert all(before.stop == after.start for before, after in pairwise(parts))
            assert max(map(len, parts)) <= micro_batch_size
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(micro_batches) == max(-(-max(map(len, expected)) // micro_batch_size), 1)


def test_a_group_may_be_larger_than_a_micro_batch_with_whole_shares() -> None:
    with pytest.raises(ConfigError, match=r"would cut a group of 8 samples.*anchor\.span=step"):
        Layout(32, 2, micro_batch_size=4, unit=8)
    dealt = Layout(32, 2, micro_batch_size=4, unit=8, whole_shares=True).deal(32)
    assert [[(part.start, part.stop) for part in parts] for parts in dealt] == [
        [(0, 4), (16, 20)],
        [(4, 8), (20, 24)],
        [(8, 12), (24, 28)],
        [(12, 16), (28, 32)],
    ]


@given(st.integers(4, 60), st.integers(0, 3), SEEDS, st.integers(1, 150))
@modest
def test_the_order_is_the_same_on_any_number_of_ranks(batch_size: int, epoch: int, seed: int, extra: int) -> None:
    order = EpochOrder(4 + extra, seed, epoch)
    orders, sums = [], set()
    for world in (1, 2, 3, 4):
        for micro_batch_size in (None, 5):
            layout = Layout(batch_size, world, micro_batch_size)
            orders.append(np.concatenate([ids for _, ids in pieces(layout, order)]).tolist())
            sums.add(total_fingerprint(layout, order))
    assert all(ids == orders[0] for ids in orders)
    assert sums == {fingerprint(epoch, 0, order.ids(0, order.num_samples), DIGEST)}


@given(layouts(), st.integers(0, 2**32), st.integers(0, 100), st.data())
@modest
def test_the_fingerprint_adds_up_and_notices_every_change(
    case: tuple[Layout, int], seed: int, epoch: int, data: st.DataObject
) -> None:
    layout, num_samples = case
    order = EpochOrder(num_samples, seed, epoch)
    ids = np.concatenate([ids for _, ids in pieces(layout, order)])
    whole = fingerprint(epoch, 0, ids, DIGEST)
    assert total_fingerprint(layout, order) == whole
    assert fingerprint(epoch + 1, 0, ids, DIGEST) != whole
    assert fingerprint(epoch, 1, ids, DIGEST) != whole
    assert fingerprint(epoch, 0, ids, "f" + DIGEST[1:]) != whole
    assert fingerprint(epoch, 0, ids[:-1], DIGEST) != whole
    if len(ids) > 1:
        a = data.draw(st.integers(0, len(ids) - 1))
        b = data.draw(st.integers(0, len(ids) - 1).filter(lambda i: i != a))
        swapped = ids.copy()
        swapped[[a, b]] = swapped[[b, a]]
        assert fingerprint(epoch, 0, swapped, DIGEST) != whole
    if num_samples > 20:  # of few samples two seeds may give the same order
        assert total_fingerprint(layout, EpochOrder(num_samples, seed + 1, epoch)) != whole


def test_the_fingerprint_of_nothing_is_nothing() -> None:
    assert fingerprint(3, 7, np.empty(0, dtype=np.int64), DIGEST) == 0


@given(st.integers(1, 500), SEEDS, st.integers(0, 50), st.booleans(), st.data())
@modest
def test_slices_of_the_order_agree_with_the_whole(
    num_samples: int, seed: int, epoch: int, large: bool, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, num_samples))
    stop = data.draw(st.integers(start, num_samples))
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(plan, "ARGSORT_LIMIT", 0)
        order = EpochOrder(num_samples, seed, epoch)
        whole = order.ids(0, num_samples)
        part = order.ids(start, stop)
    assert whole.dtype == part.dtype == np.int64
    assert part.tolist() == whole[start:stop].tolist()
    assert sorted(whole.tolist()) == list(range(num_samples))


def test_threads_that_need_the_same_order_at_once_share_one() -> None:
    # each computing its own would cost every thread a sort and a copy of the whole order
    start = threading.Barrier(6)

    def whole_order(_: int) -> np.ndarray:
        start.wait()
        return EpochOrder(300_000, 77, 5).ids(0, 300_000)

    with ThreadPoolExecutor(6) as pool:
        orders = list(pool.map(whole_order, range(6)))
    assert all(np.shares_memory(orders[0], order) for order in orders)


def test_positions_outside_the_epoch_are_a_mistake() -> None:
    for start, stop in ((-1, 2), (0, 11), (5, 4)):
        with pytest.raises(ValueError, match="outside"):
            EpochOrder(10, 0, 0).ids(start, stop)


@pytest.mark.parametrize("limit", [plan.ARGSORT_LIMIT, 0])
def test_epochs_and_seeds_differ(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARGSORT_LIMIT", limit)
    orders = {tuple(EpochOrder(50, seed, epoch).ids(0, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


SMALL = [*range(1, 80), *(2**k + d for k in range(7, 13) for d in (-1, 0, 1))]


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_the_permutation_for_large_sets_is_a_bijection(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARGSORT_LIMIT", 0)
    for num_samples in SMALL:
        ids = EpochOrder(num_samples, seed, 3).ids(0, num_samples)
        assert np.array_equal(np.sort(ids), np.arange(num_samples)), num_samples


@pytest.mark.parametrize("num_samples", [plan.ARGSORT_LIMIT + 1, 2**40])
def test_a_window_of_a_huge_epoch_costs_no_memory(num_samples: int) -> None:
    order = EpochOrder(num_samples, 1, 2)
    tracemalloc.start()
    windows = [order.ids(start, start + 2000) for start in (0, num_samples // 2, num_samples - 2000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ids = np.concatenate(windows)
    assert peak < 2**20
    assert ids.min() >= 0 and ids.max() < num_samples and len(set(ids.tolist())) == len(ids)
    # spread over the whole set: each tenth of it holds about a tenth of them (600 +- 23)
    assert np.all(np.abs(np.bincount(ids * 10 // num_samples, minlength=10) - 600) < 120)


@pytest.mark.parametrize("limit", [plan.ARGSORT_LIMIT, 0])
def test_every_order_is_about_as_likely(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARGSORT_LIMIT", limit)
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(EpochOrder(4, 5, epoch).ids(0, 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 60  # chi-square, 23 degrees of freedom


def test_frozen_values() -> None:
    """A run resumed by a later version must see the same order: these numbers may never change."""
    order = EpochOrder(10, 0, 0).ids(0, 10)
    assert order.tolist() == [6, 2, 5, 7, 8, 9, 3, 4, 0, 1]
    assert EpochOrder(2**40, 0, 0).ids(0, 3).tolist() == [234318756736, 927395511548, 463638630260]
    assert fingerprint(0, 0, order, DIGEST) == 16049051647795438345
    assert keyed_hash_int(1, 2, 3) == 16553780629573083825
    assert plan.ARGSORT_LIMIT == 10_000_000  # moving it would change the order of sets in between


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(-(2**70), 2**70), max_size=3))
@modest
def test_one_hash_equals_the_hash_of_an_array(value: int, keys: list[int]) -> None:
    word = value % 2**64
    assert keyed_hash_int(value, *keys) == int(keyed_hash(np.array([5, word], dtype=np.uint64), *keys)[1])
    assert keyed_hash_int(value, *keys, 0) != keyed_hash_int(value, *keys, 1)


REFUSED = [
    ({"batch_size": 0, "world": 1}, "at least 1"),
    ({"batch_size": 8, "world": 1, "micro_batch_size": 0}, "at least 1"),
    ({"batch_size": 3, "world": 4}, "batch_size >= 4 or fewer ranks"),
    ({"batch_size": 64, "world": 3, "unit": 32}, "batch_size >= 65 or fewer ranks"),
    (
        {"batch_size": 128, "world": 1, "micro_batch_size": 48, "unit": 32},
        "a multiple of 32, such as 32",
    ),
    (
        {"batch_size": 128, "world": 2, "micro_batch_size": 16, "unit": 32},
        "a multiple of 32, such as 32",
    ),
]


@pytest.mark.parametrize(("arguments", "remedy"), REFUSED)
def test_a_layout_that_idles_or_cuts_is_refused(arguments: dict[str, int], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        Layout(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 4, "world": 4},
        {"batch_size": 65, "world": 3, "unit": 32},
        {"batch_size": 128, "world": 1, "micro_batch_size": 32, "unit": 32},
        {"batch_size": 20, "world": 1, "micro_batch_size": 20, "unit": 32},  # a single, short group that fits
    ],
)
def test_the_remedies_are_accepted(arguments: dict[str, int]) -> None:
    assert Layout(**arguments).steps(arguments["batch_size"]) == 1


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 samples, less than batch_size=10.*smaller batch_size or data.drop_last"):
        Layout(10, 2, drop_last=True).steps(9)
    with pytest.raises(ConfigError, match=r"3 samples, too few for 4 ranks.*fewer ranks"):
        Layout(8, 4).steps(3)
    with pytest.raises(ConfigError, match="too few for 1 ranks"):
        Layout(8, 1).steps(0)
    assert Layout(10, 2, drop_last=True).steps(19) == 1 and Layout(10, 2).steps(11) == 2
