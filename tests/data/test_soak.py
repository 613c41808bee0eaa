"""Reading does not grow: a small sample of `make soak`."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from benchmarks.soak import KINDS, soak
from oat_dist.data.index import ShardSet

SIZE = 96
LIMIT = 16 << 20  # malloc itself keeps and gives back a few MiB


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_where_it_is(cifar: ShardSet, kind: str) -> None:
    """1,800 images of 27 KiB in the second half: a reference kept to every batch would be 47 MiB."""
    soak(cifar, kind, epochs=4, size=SIZE)  # libraries allocate once for all what they use
    threads = psutil.Process().num_threads()
    before, after = soak(cifar, kind, epochs=30, size=SIZE)
    assert after - before < LIMIT
    assert psutil.Process().num_threads() <= threads + 1


def test_the_measure_sees_what_is_kept(cifar: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a loader that keeps something of every window, more than malloc may have free, grows."""
    from oat_dist.data.loader import TrainLoader

    kept = []
    windows = TrainLoader.windows

    def keeping(self: TrainLoader, first: int, last: int):
        for window in windows(self, first, last):
            kept.append(np.ones(4 << 20, dtype=np.uint8))
            yield window

    monkeypatch.setattr(TrainLoader, "windows", keeping)
    before, after = soak(cifar, "squash", epochs=30, size=SIZE)
    assert after - before > LIMIT
