"""Reading does not grow: a small sample of `make soak`."""

from __future__ import annotations

from ranks import run_ranks

from benchmarks.soak import KINDS
from oat_dist.data.index import ShardSet

LIMIT = 16 << 20  # malloc itself keeps and gives back a few MiB


def test_memory_stays_where_it_is(cifar: ShardSet) -> None:
    """1,800 images of 27 KiB in the second half: a reference kept to every batch would be 47 MiB."""
    [found] = run_ranks(1, "data.soak_checks:growth", str(cifar.folder))
    assert found.keys() == set(KINDS)
    for kind, grown in found.items():
        assert grown["bytes"] < LIMIT, kind
        assert grown["threads"] <= 1, kind


def test_the_measure_sees_what_is_kept(cifar: ShardSet) -> None:
    """The control."""
    assert run_ranks(1, "data.soak_checks:growth_of_what_is_kept", str(cifar.folder))[0] > LIMIT
