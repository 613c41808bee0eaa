"""What goes into which shard, known before anything is read: counts, sizes of the sources, and nothing else.

A split's samples are held once as the list it was given as, besides that in NumPy columns; forked workers write to
none of them, so the memory stays shared. Every *job* is a range of the packing order that becomes one shard, or several
where its bytes could not be known ahead (callables, images written anew).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL
import simplejpeg

from oat_dist.data.packing.fingerprint import UNKNOWN_SIZE, Stamper, stamp_file
from oat_dist.data.packing.recode import Recode
from oat_dist.data.packing.samples import Sample, order_of, sample_keys, seeded_hashes
from oat_dist.data.packing.tarwriter import tar_capacity, tar_record_size
from oat_dist.errors import DataError

__all__ = ["Job", "OnBad", "PackOptions", "SplitPlan", "cut_into_jobs", "examined_at_once", "job_digest"]

OnBad = Literal["stop", "skip"]

_EXAMINED_AT_ONCE = 4096


@dataclass(frozen=True)
class PackOptions:
    """Arguments of `write_shards` that hold for every split."""

    source: str | Mapping[str, str]  # one for all, or one for each split
    seed: int
    shard_samples: int
    shard_bytes: int
    on_bad: OnBad
    recode: Recode | None

    def __post_init__(self) -> None:
        for name in ("shard_samples", "shard_bytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.on_bad not in ("stop", "skip"):
            raise DataError(f'on_bad is {self.on_bad!r}; it must be "stop" or "skip"')

    def describe(self, split: str) -> str:
        """For the manifest of a split, where its images come from and what was done to them."""
        source = self.source if isinstance(self.source, str) else self.source[split]
        return source if self.recode is None else f"{source}; {self.recode.describe()}"


def examined_at_once(total: int) -> Iterator[tuple[int, int]]:
    """Ranges of ranks that are worth a worker's message."""
    for start in range(0, total, _EXAMINED_AT_ONCE):
        yield start, min(total, start + _EXAMINED_AT_ONCE)


class _Paths:
    """The paths among the samples' data as one block of bytes: reading them leaves Python's objects untouched."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        block = bytearray()
        ends = array("q", [0])
        for start, stop in examined_at_once(len(samples)):
            paths = [_encoded(sample.data) for sample in samples[start:stop]]
            ends.extend(itertools.accumulate(map(len, paths), initial=len(block)))
            ends.pop(-len(paths) - 1)  # where the block ended before
            block += b"".join(paths)
        self._block, self._ends = bytes(block), ends

    def __getitem__(self, rank: int) -> bytes:
        """Empty if the data of that sample is no path."""
        return self._block[self._ends[rank] : self._ends[rank + 1]]


def _encoded(data: object) -> bytes:
    return os.fsencode(data) if isinstance(data, (str, Path, os.PathLike)) else b""  # Path first: it is asked quickly


class SplitPlan:
    """One split: its samples by rank, the order they are packed in, and what is known of their sources.

    `examine` must have been called for all ranks, and then `settle_order`, before the columns say anything.
    """

    def __init__(self, split: str, samples: list[Sample], labels: np.ndarray, seed: int) -> None:
        self.split, self.samples, self.labels, self.seed = split, samples, labels, seed
        self.paths = _Paths(samples)
        # In memory that is shared with processes forked later. Size -1: unknown.
        columns = np.frombuffer(mmap.mmap(-1, 5 * 8 * len(samples)), dtype=np.int64).reshape(5, -1)
        self.sizes, self.stamps, self.order = columns[:3]
        self.hashes = columns[3:].view(np.uint64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.samples)

    def examine(self, start: int, stop: int) -> None:
        """Look at the sources of the samples of rank `start` to `stop`; no other range is touched."""
        stamper = Stamper()
        found = [
            stamp_file(path) if (path := self.paths[rank]) else stamper.stamp(self.samples[rank])
            for rank in range(start, stop)
        ]
        self.sizes[start:stop], self.stamps[start:stop] = zip(*found, strict=True)
        self.hashes[start:stop] = seeded_hashes(sample_keys(range(start, stop), len(self)), self.seed)

    def settle_order(self) -> None:
        self.order[:] = order_of(self.hashes)


class Job(NamedTuple):
    """Positions `start` to `stop` of a split's packing order; `content`: bytes of its samples, as far as known."""

    start: int
    stop: int
    content: int


def cut_into_jobs(plan: SplitPlan, options: PackOptions) -> list[Job]:
    """As many samples as fit into a shard, again and again; those of unknown size are counted only."""
    sizes = plan.sizes[plan.order]
    known = (sizes != UNKNOWN_SIZE) & (options.recode is None)
    ends = np.cumsum(np.where(known, tar_record_size(sizes), 0))
    capacity = tar_capacity(options.shard_bytes)
    jobs, start, before = [], 0, 0
    while start < len(plan):
        fitting = int(np.searchsorted(ends, before + capacity, side="right"))
        stop = min(max(fitting, start + 1), start + options.shard_samples, len(plan))
        jobs.append(Job(start, stop, int(ends[stop - 1]) - before))
        start, before = stop, int(ends[stop - 1])
    return jobs


def job_digest(plan: SplitPlan, job: Job, options: PackOptions) -> str:
    """Names all that decides the bytes of a job's shards: what is finished under it need not be done again."""
    settings: list[object] = [plan.split, len(plan), options.shard_bytes]
    if options.recode is not None:
        settings += [options.recode.describe(), PIL.__version__, simplejpeg.__version__]
    ranks = plan.order[job.start : job.stop]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for column in (ranks, plan.labels[ranks], plan.sizes[ranks], plan.stamps[ranks]):
        digest.update(np.ascontiguousarray(column).data)
    digest.update("\0".join(plan.samples[rank].name for rank in ranks.tolist()).encode())
    return digest.hexdigest()
