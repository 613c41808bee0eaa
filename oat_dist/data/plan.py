"""Which samples, in which order, on which rank: pure functions of (seed, epoch, position, world size).

1. `EpochOrder` turns (number of samples, seed, epoch) into one order of all sample ids. It knows nothing of ranks or
   threads, nor of shards unless told to (`ShardWindows`), and uses its own 64-bit hash, so it is the same with any
   version of any library.
2. Global batch k is the slice [k B, (k+1) B) of that order; the last one may be short.
3. `Layout.deal` cuts a global batch into micro-batches (consecutive slices) and each of those into one contiguous
   part a rank, in whole units (the groups of anchor scope "group", else single samples), as evenly as it goes. With
   `whole_shares` (anchor span "step") it is the other way round: each rank has one contiguous share of the global
   batch, in whole units, and cuts that into micro-batches wherever it likes.
4. `fingerprint` sums a hash of (epoch, position, id) over what was consumed: equal sums mean equal order.

So a position (epoch, samples consumed) is all a resumed run needs, also on another number of ranks.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import numpy as np

from oat_dist.data.hashing import GOLDEN, keyed_hash, keyed_hash_int, mix
from oat_dist.data.windows import ShardWindows
from oat_dist.errors import ConfigError

__all__ = ["EpochOrder", "Layout", "Part", "ShardWindows", "fingerprint", "keyed_hash", "keyed_hash_int"]

# Above this many samples the permutation is computed position by position instead of being held in memory.
ARGSORT_LIMIT = 10_000_000
# All threads need a new epoch's order at the same moment: one computes it, the others wait, none holds a copy.
_PERMUTATION_LOCK = threading.Lock()


@dataclass(frozen=True)
class EpochOrder:
    """The order of all sample ids in one epoch, computed slice by slice.

    `windows` shuffles within windows of shards, for remote data that does not fit the cache; None: all with all.
    """

    num_samples: int
    seed: int
    epoch: int
    windows: ShardWindows | None = None

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Sample ids (int64) at positions [start, stop) of this epoch."""
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"positions [{start}, {stop}) lie outside 0..{self.num_samples}")
        if self.windows is not None:
            return self.windows.ids(self.seed, self.epoch, start, stop)
        if self.num_samples <= ARGSORT_LIMIT:
            with _PERMUTATION_LOCK:
                return _permutation(self.num_samples, self.seed, self.epoch)[start:stop]
        return _feistel(np.arange(start, stop, dtype=np.uint64), self.num_samples, self.seed, self.epoch)


@functools.lru_cache(maxsize=4)  # this epoch and the next, for training and evaluation
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.argsort(keyed_hash(np.arange(num_samples), seed, epoch, 1), kind="stable")
    order.flags.writeable = False
    return order


def _feistel(positions: np.ndarray, num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A keyed permutation of 0..num_samples-1 evaluated at `positions`: a Feistel network on the next even power of
    two, walked along its cycle until it falls inside the range (at most four rounds of walking on average)."""
    half = np.uint64(max((num_samples - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    values = positions.copy()
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(6):
            left, right = right, left ^ (keyed_hash(right, seed, epoch, 2, round_number) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(num_samples)
    return values.astype(np.int64)


@dataclass(frozen=True)
class Part:
    """A rank's part of one micro-batch: positions [start, stop) counted from the start of the global batch."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """How global batches are dealt.

    Args:
        batch_size: samples of a global batch, B.
        world: number of ranks, W.
        micro_batch_size: most samples a rank holds in one forward pass; None: all of its share.
        unit: samples that must stay together (a group of anchor scope "group"), else 1.
        drop_last: whether the last, short global batch of an epoch is dropped.
        whole_shares: deal the global batch over the ranks first and cut each share into micro-batches after; an
            anchor set may then be larger than a micro-batch.

    Raises:
        ConfigError: a batch that cannot be dealt without an idle rank or a cut group; names the remedy.
    """

    batch_size: int
    world: int
    micro_batch_size: int | None = None
    unit: int = 1
    drop_last: bool = False
    whole_shares: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.micro_batch_size is not None and self.micro_batch_size < 1):
            raise ConfigError("batch_size and micro_batch_size must be at least 1")
        units = -(-self.batch_size // self.unit)
        if units < self.world:
            what = "samples" if self.unit == 1 else f"groups of {self.unit}"
            raise ConfigError(
                f"batch_size={self.batch_size} is {units} {what}, fewer than the {self.world} ranks: a rank would be "
                f"idle; use batch_size >= {self.unit * (self.world - 1) + 1} or fewer ranks"
            )
        if self.micro_batch_size is None or self.whole_shares:
            return
        largest = -(-units // self.world) * self.unit
        if self.micro_batch_size % self.unit and min(largest, self.batch_size) > self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} would cut a group of {self.unit} samples (of anchor "
                f"groups and mixed pairs); use a multiple of {self.unit}, such as "
                f"{max(self.micro_batch_size // self.unit, 1) * self.unit}, or anchor.span=step without data.mix"
            )

    def steps(self, num_samples: int) -> int:
        """Optimizer steps of an epoch over `num_samples`.

        Raises:
            ConfigError: too few samples for one step, or for one sample a rank.
        """
        if self.drop_last and num_samples < self.batch_size:
            raise ConfigError(
                f"the data set has {num_samples} samples, less than batch_size={self.batch_size}: data.drop_last "
                "would drop everything; use a smaller batch_size or data.drop_last=false"
            )
        if -(-num_samples // self.unit) < self.world:
            raise ConfigError(
                f"the data set has {num_samples} samples, too few for {self.world} ranks in units of {self.unit}: "
                "a rank would be idle for whole epochs; use fewer ranks"
            )
        return num_samples // self.batch_size if self.drop_last else -(-num_samples // self.batch_size)

    @property
    def largest_part(self) -> int:
        """Most samples that a rank holds in one forward pass."""
        return max(len(part) for parts in self.deal(self.batch_size) for part in parts)

    def batch_range(self, step: int, num_samples: int) -> tuple[int, int]:
        """Positions [start, stop) of global batch `step` in its epoch."""
        start = step * self.batch_size
        return start, min(start + self.batch_size, num_samples)

    def deal(self, count: int) -> list[list[Part]]:
        """Parts ``[micro-batch][rank]`` of a global batch of `count` samples.

        Only the last micro-batch is dealt unevenly and may leave a rank empty (of a full batch of 9 on 2 ranks with
        micro_batch_size=2, the ninth sample); a rank with none in a whole batch occurs in a short batch only.
        """
        if self.whole_shares:
            return _deal_shares(count, self.world, self.micro_batch_size, self.unit)
        return _deal(count, self.world, self.micro_batch_size, self.unit)


@functools.lru_cache(maxsize=64)
def _deal_shares(count: int, world: int, micro_batch_size: int | None, unit: int) -> list[list[Part]]:
    [shares] = _deal(count, world, None, unit)
    largest = max(len(share) for share in shares)
    number = 1 if micro_batch_size is None else max(-(-largest // micro_batch_size), 1)
    cuts = [[share.start + len(share) * cut // number for cut in range(number + 1)] for share in shares]
    return [[Part(edges[m], edges[m + 1]) for edges in cuts] for m in range(number)]


@functools.lru_cache(maxsize=64)
def _deal(count: int, world: int, micro_batch_size: int | None, unit: int) -> list[list[Part]]:
    units = -(-count // unit)
    share = -(-units // world)  # units of the fullest rank if all went through at once
    if micro_batch_size is not None and min(share * unit, count) > micro_batch_size:
        share = micro_batch_size // unit
    micro_batches = []
    for first in range(0, units, share * world):
        here = min(share * world, units - first)
        base, extra = divmod(here, world)
        parts, cursor = [], first
        for rank in range(world):
            until = cursor + base + (rank < extra)
            parts.append(Part(min(cursor * unit, count), min(until * unit, count)))
            cursor = until
        micro_batches.append(parts)
    return micro_batches


def fingerprint(epoch: int, start: int, ids: np.ndarray, digest: str) -> int:
    """Sum modulo 2^64 of a hash of (data digest, epoch, position, id) over consecutive positions from `start`.

    Sums of parts add up (modulo 2^64) to the sum of the whole, in any order and on any number of ranks.
    """
    positions = np.arange(start, start + len(ids))
    hashes = keyed_hash(
        mix(positions.astype(np.uint64) + GOLDEN) ^ np.asarray(ids).astype(np.uint64),
        int(digest[:16], 16),
        epoch,
    )
    return int(hashes.sum(dtype=np.uint64)) if len(ids) else 0
