"""Reading does not grow: a small sample of `make soak`."""

from __future__ import annotations

import psutil
import pytest

from benchmarks.soak import KINDS, soak
from oat_dist.data.index import ShardSet


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_where_it_is(cifar: ShardSet, kind: str) -> None:
    """1,800 images in the second half: a reference kept to every batch would be 5 MiB."""
    soak(cifar, kind, epochs=10)  # libraries allocate once for all what they use
    threads = psutil.Process().num_threads()
    before, after = soak(cifar, kind, epochs=30)
    assert after - before < 2 << 20
    assert psutil.Process().num_threads() <= threads + 1


def test_the_measure_sees_what_is_kept(cifar: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a loader that keeps its windows grows."""
    from oat_dist.data.loader import TrainLoader

    kept = []
    windows = TrainLoader.windows

    def keeping(self: TrainLoader, first: int, last: int):
        for window in windows(self, first, last):
            kept.append(window)
            yield window

    monkeypatch.setattr(TrainLoader, "windows", keeping)
    soak(cifar, "squash", epochs=3)
    before, after = soak(cifar, "squash", epochs=30)
    assert after - before > 4 << 20
