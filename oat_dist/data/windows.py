"""The order of an epoch in windows of shards, for remote data that does not fit the local cache.

1. All shards are put in a random order of their own, by hash of (seed, epoch, shard number).
2. That order is cut into windows of at most so many shards, as evenly as it goes.
3. The samples of a window, of all its shards together, are ordered by hash of (seed, epoch, sample id).

It is a pure function of (seed, epoch, shard of each sample): the same on any number of ranks, resumable anywhere.
Nothing is held but a few stretches of the order (one window, or as many small ones as make about `STRETCH` samples):
each is found by one pass over the index's shard column when it is first needed (0.3 s for 100 million samples).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from oat_dist.data.hashing import keyed_hash
from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError, DataError

__all__ = ["ShardWindows"]

STRETCH = 1 << 20
_KEPT = 3  # this stretch, the next one, and one for whoever lags behind
_CHUNK = 1 << 20  # rows looked at together
_SHARD_ORDER, _SAMPLE_ORDER = 101, 102


@dataclass(frozen=True)
class _Epoch:
    """The shards of an epoch in order, cut at `edges` into windows, whose first positions are `starts`."""

    order_S: np.ndarray
    edges: np.ndarray
    starts: np.ndarray


class ShardWindows:
    """Windows over the shards of one split. Used from several threads.

    Args:
        shards: the opened split.
        num_shards: most shards of a window, those that are shuffled together.

    Raises:
        ConfigError: a window of no shards.
        DataError: a manifest whose shards do not hold its number of samples.
    """

    def __init__(self, shards: ShardSet, num_shards: int) -> None:
        if num_shards < 1:
            raise ConfigError(f"data.shuffle_shards={num_shards}: a window needs at least 1 shard; null shuffles all")
        self.shards = shards
        self.num_shards = num_shards
        self.num_windows = -(-len(shards.manifest.shards) // num_shards)
        self._counts_S = np.array([shard.samples for shard in shards.manifest.shards], dtype=np.int64)
        if self._counts_S.sum() != shards.num_samples:
            raise self._disagreement()
        self._lock = threading.Lock()
        self._stretches: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[tuple[int, int], _Epoch] = OrderedDict()

    def ids(self, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids (int64) at positions [start, stop) of this epoch.

        Raises:
            DataError: the index does not hold as many samples of a shard as the manifest says.
        """
        with self._lock:
            cut = self._epoch(seed, epoch)
            parts = []
            while start < stop:
                first, end, ids = self._stretch(seed, epoch, cut, start)
                parts.append(ids[start - first : min(stop, end) - first])
                start = min(stop, end)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def upcoming(self, seed: int, epoch: int, position: int) -> np.ndarray:
        """Numbers of the shards to have at hand at this position: those of its window, then those of the next."""
        with self._lock:
            cut = self._epoch(seed, epoch)
            window = min(_window_at(cut, position), self.num_windows - 1)
            here = cut.order_S[cut.edges[window] : cut.edges[window + 1]]
            if window + 1 < self.num_windows:
                after = cut.order_S[cut.edges[window + 1] : cut.edges[window + 2]]
            else:
                following = self._epoch(seed, epoch + 1)
                after = following.order_S[: following.edges[1]]
        return np.concatenate([here, after])

    def lacking(self, seed: int, epoch: int) -> dict[int, np.ndarray]:
        """The classes that a window of this epoch has no sample of, by window. Reads two columns of the index whole.

        Classes without any sample in the split do not count. Uses windows x classes bytes.
        """
        with self._lock:
            lookup_S = self._lookup(self._epoch(seed, epoch), 0, self.num_windows)
        classes = len(self.shards.classes)
        index = self.shards.index
        present_WC = np.zeros((self.num_windows, classes), dtype=bool)
        empty = [k for k, count in enumerate(self.shards.manifest.class_counts[:classes]) if not count]
        present_WC[:, empty] = True
        for first in range(0, len(index), _CHUNK):
            label = index.label[first : first + _CHUNK]
            usable = (label >= 0) & (label < classes)  # a wrong label is an error where it is used
            window = lookup_S[self._shard_rows(first)]
            present_WC[window[usable], label[usable]] = True
        return {int(w): np.flatnonzero(~present_WC[w]) for w in np.flatnonzero(~present_WC.all(axis=1))}

    def notes(self, seed: int) -> list[str]:
        """What a user should know before training: windows of the first epoch without some classes; a small cache."""
        notes = []
        lacking = self.lacking(seed, 0)
        if lacking:
            window, missing = next(iter(lacking.items()))
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            notes.append(
                f"note: data.shuffle_shards={self.num_shards}: {len(lacking)} of {self.num_windows} windows of the "
                f"first epoch lack classes (window {window + 1}: {self.shards.classes[missing[0]]!r}{more}), so their "
                "batches do too; use more shards, or pack in random order as shards/pack.py does"
            )
        cache = self.shards.cache
        sizes = sorted((shard.size for shard in self.shards.remote_shards()), reverse=True)
        need = sum(sizes[: 2 * self.num_shards])
        if cache.limit is not None and need > cache.limit:
            notes.append(
                f"note: data.shuffle_shards={self.num_shards} needs {need / 1e9:.3g} GB of cache for a window and the "
                f"next, data.cache_gb is {cache.limit / 1e9:.3g}: shards will be fetched again and again; use fewer "
                "shards or a larger cache"
            )
        return notes

    def _epoch(self, seed: int, epoch: int) -> _Epoch:
        found = self._epochs.get((seed, epoch))
        if found is None:
            number = len(self._counts_S)
            order_S = np.argsort(keyed_hash(np.arange(number), seed, epoch, _SHARD_ORDER), kind="stable")
            edges = np.arange(self.num_windows + 1) * number // max(self.num_windows, 1)
            starts = np.concatenate([[0], np.cumsum(self._counts_S[order_S])])[edges]
            found = self._epochs[seed, epoch] = _Epoch(order_S, edges, starts)
            if len(self._epochs) > _KEPT:
                self._epochs.popitem(last=False)
        return found

    def _stretch(self, seed: int, epoch: int, cut: _Epoch, position: int) -> tuple[int, int, np.ndarray]:
        """(first position, end, ids in order) of the stretch that holds `position`."""
        number = cut.starts[_window_at(cut, position)] // STRETCH
        windows = np.flatnonzero(cut.starts[:-1] // STRETCH == number)
        first, last = int(windows[0]), int(windows[-1]) + 1
        key = (seed, epoch, int(number))
        if key not in self._stretches:
            while len(self._stretches) >= _KEPT:
                self._stretches.popitem(last=False)
            self._stretches[key] = self._ordered(seed, epoch, cut, first, last)
        self._stretches.move_to_end(key)
        return int(cut.starts[first]), int(cut.starts[last]), self._stretches[key]

    def _ordered(self, seed: int, epoch: int, cut: _Epoch, first: int, last: int) -> np.ndarray:
        """Sample ids of windows [first, last), window after window, each in its own order."""
        lookup_S = self._lookup(cut, first, last)
        ids, windows = [], []
        for row in range(0, len(self.shards.index), _CHUNK):
            window = lookup_S[self._shard_rows(row)]
            found = np.flatnonzero(window >= 0)
            ids.append(found + row)
            windows.append(window[found])
        ids_N, window_N = np.concatenate(ids), np.concatenate(windows)
        if not np.array_equal(np.bincount(window_N, minlength=last - first), np.diff(cut.starts[first : last + 1])):
            raise self._disagreement()
        hashes_N = keyed_hash(ids_N, seed, epoch, _SAMPLE_ORDER)
        ordered_N = ids_N[np.lexsort((hashes_N, window_N))]
        ordered_N.flags.writeable = False
        return ordered_N

    def _lookup(self, cut: _Epoch, first: int, last: int) -> np.ndarray:
        """By shard: its window, counted from `first`; -1 outside of windows [first, last). (S,) int32."""
        lookup_S = np.full(len(self._counts_S), -1, dtype=np.int32)
        sizes = np.diff(cut.edges[first : last + 1])
        lookup_S[cut.order_S[cut.edges[first] : cut.edges[last]]] = np.repeat(np.arange(last - first), sizes)
        return lookup_S

    def _shard_rows(self, first: int) -> np.ndarray:
        shard = self.shards.index.shard[first : first + _CHUNK]
        if int(shard.max(initial=0)) >= len(self._counts_S):
            raise self._disagreement()
        return shard

    def _disagreement(self) -> DataError:
        return DataError(
            f"{self.shards.where}: manifest and index do not agree on which samples lie in which shard; "
            "restore both from one packing, or pack again"
        )


def _window_at(cut: _Epoch, position: int) -> int:
    """The window that holds `position`; empty ones never do."""
    return int(np.searchsorted(cut.starts, position, side="right")) - 1
