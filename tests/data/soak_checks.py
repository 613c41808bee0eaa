"""What test_soak.py measures in a process of its own: in one that has much memory free already, nothing grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.soak import KINDS, soak
from oat_dist.data.index import open_split
from oat_dist.data.loader import TrainLoader

SIZE = 96


def growth(folder: str) -> dict[str, dict[str, int]]:
    """By kind: bytes and threads that the second half of 30 epochs has added."""
    shards, found = open_split(Path(folder)), {}
    for kind in KINDS:
        soak(shards, kind, epochs=4, size=SIZE)  # libraries allocate once for all what they use
        threads = psutil.Process().num_threads()
        before, after = soak(shards, kind, epochs=30, size=SIZE)
        found[kind] = {"bytes": after - before, "threads": psutil.Process().num_threads() - threads}
    return found


def growth_of_what_is_kept(folder: str) -> int:
    """The same of a loader that keeps something of every window, more than malloc may have free."""
    kept: list[np.ndarray] = []
    windows = TrainLoader.windows

    def keeping(self: TrainLoader, first: int, last: int) -> Any:
        for window in windows(self, first, last):
            kept.append(np.ones(4 << 20, dtype=np.uint8))
            yield window

    TrainLoader.windows = keeping  # type: ignore[method-assign]  # this process ends with the measurement
    before, after = soak(open_split(Path(folder)), "squash", epochs=30, size=SIZE)
    return after - before
