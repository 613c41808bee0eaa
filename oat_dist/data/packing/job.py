"""What a worker does: one job, from the samples' sources to finished shards on disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oat_dist.data.images.imagecheck import ImageInfo, check_image
from oat_dist.data.ordered_map import ordered_map
from oat_dist.data.packing.fingerprint import UNKNOWN_SIZE
from oat_dist.data.packing.parts import COLUMNS, Part, part_tar
from oat_dist.data.packing.plan import PackOptions, SplitPlan
from oat_dist.data.packing.samples import Sample, sample_key
from oat_dist.data.packing.tarwriter import SampleTar, tar_capacity, tar_record_size
from oat_dist.errors import DataError

__all__ = ["JobRange", "pack_job"]

_MAX_IMAGE_BYTES = (1 << 32) - 1  # the index holds lengths as 32 bits
_TOO_LARGE = "larger than 4 GiB"
_FIRST_READ = 1 << 16
_LOT_SAMPLES, _LOT_BYTES = 32, 1 << 18
# Errors that say nothing about the file itself: such a sample is never left out, packing stops.
_NOT_THE_FILE = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)


class JobRange(NamedTuple):
    """What is left to do of a job: positions `start` to `stop` of the packing order, from part `part` on."""

    job: int
    start: int
    stop: int
    part: int
    digest: str


# A sample that has been read: rank, what to store, and what it is; or None and the reason why it cannot be used.
_Loaded = tuple[int, bytes, ImageInfo | None, str]


def pack_job(
    plan: SplitPlan, folder: Path, options: PackOptions, work: JobRange, threads: int, advance: Callable[[int], None]
) -> Callable[[], None]:
    """Write the parts of a job into `folder`; `advance` counts the images. Call what is returned to finish the last.

    Raises:
        DataError: an image that cannot be used, with on_bad "stop"; a shard that reads back otherwise.
        OSError: the disk is full, or cannot be written.
    """
    ranks = plan.order[work.start : work.stop]
    labels = plan.labels[ranks].tolist()
    with _PartWriter(plan, folder, options, work) as writer, _loaded(plan, ranks, options, threads) as loaded:
        for label, (rank, data, info, reason) in zip(labels, loaded, strict=True):
            if info is None:
                if options.on_bad == "stop":
                    raise DataError(_unreadable(plan, rank, reason))
                writer.skip(rank, reason)
            else:
                writer.add(rank, label, data, info)
            advance(1)
        return writer.end_part()


@contextlib.contextmanager
def _loaded(plan: SplitPlan, ranks: np.ndarray, options: PackOptions, threads: int) -> Iterator[Iterator[_Loaded]]:
    """The samples of these ranks, in their order."""
    lots = _lots(ranks.tolist(), plan.sizes[ranks].tolist())
    load = functools.partial(_load, plan, options.recode.apply if options.recode is not None else _keep)
    if threads == 1:
        yield itertools.chain.from_iterable(map(load, lots))
        return
    pool = ThreadPoolExecutor(threads)
    try:
        loaded = ordered_map(
            pool, load, lots, workers=threads, size=lambda lot: sum(len(data) for _, data, _, _ in lot)
        )
        yield itertools.chain.from_iterable(loaded)
    finally:
        pool.shutdown(cancel_futures=True)


def _lots(ranks: list[int], sizes: list[int]) -> list[list[tuple[int, int]]]:
    """(rank, size) in lots of a few small files; a large one, or one of unknown size, is a lot of its own."""
    lots: list[list[tuple[int, int]]] = []
    room = 0
    for rank, size in zip(ranks, sizes, strict=True):
        needed = max(size, _LOT_BYTES // _LOT_SAMPLES) if size != UNKNOWN_SIZE else _LOT_BYTES
        room -= needed
        if room < 0:
            lots.append([])
            room = _LOT_BYTES - needed
        lots[-1].append((rank, size))
    return lots


def _keep(data: bytes) -> tuple[bytes, ImageInfo]:
    return data, check_image(data)


def _load(
    plan: SplitPlan, prepare: Callable[[bytes], tuple[bytes, ImageInfo]], lot: list[tuple[int, int]]
) -> list[_Loaded]:
    # First all are read, then all decoded: with tiny images, doing one thing at a time saves a fifth of all time.
    return [_prepared(prepare, *read) for read in [_read(plan, rank, size) for rank, size in lot]]


def _read(plan: SplitPlan, rank: int, size: int) -> tuple[int, bytes, str]:
    """The rank, the bytes of its source, and the reason if there are none."""
    try:
        path = plan.paths[rank]
        return rank, _read_file(path, size) if path else _read_sample(plan.samples[rank]), ""
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            why = f"cannot be read now ({error.strerror}); mend that and start again"
            raise DataError(f"{_where(plan, rank)}: {why}") from error
        return rank, b"", error.strerror or type(error).__name__
    except DataError as error:
        return rank, b"", str(error)


def _prepared(prepare: Callable[[bytes], tuple[bytes, ImageInfo]], rank: int, data: bytes, reason: str) -> _Loaded:
    if reason:
        return rank, b"", None, reason
    try:
        data, info = prepare(data)
        if len(data) > _MAX_IMAGE_BYTES:
            raise DataError(_TOO_LARGE)
        return rank, data, info, ""
    except DataError as error:
        return rank, b"", None, str(error)


def _read_file(path: bytes, size: int) -> bytes:
    """All bytes of a file that is expected to have `size` of them (-1: unknown)."""
    if size > _MAX_IMAGE_BYTES:
        raise DataError(_TOO_LARGE)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except ValueError as error:
        raise DataError("the path holds a NUL byte") from error
    try:
        data = os.read(descriptor, size + 1 if size != UNKNOWN_SIZE else _FIRST_READ)
        if len(data) == size:
            return data
        parts = [data]
        while parts[-1]:  # it has grown or shrunk, or comes in pieces
            parts.append(os.read(descriptor, 1 << 20))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _read_sample(sample: Sample) -> bytes:
    data = sample.data() if callable(sample.data) else sample.data
    if not isinstance(data, bytes):
        raise DataError(f"the data is of type {type(data).__name__}; give bytes, a path, or a callable giving bytes")
    return data


def _where(plan: SplitPlan, rank: int) -> str:
    sample = plan.samples[rank]
    if isinstance(sample.data, (str, os.PathLike)):
        return os.fspath(sample.data)
    return f"split {plan.split!r}, sample {sample.name!r}"


def _unreadable(plan: SplitPlan, rank: int, reason: str) -> str:
    return (
        f"{_where(plan, rank)}: unreadable image ({reason}); mend or remove it, or leave such images out "
        'and list them with --on-bad skip (on_bad="skip")'
    )


class _PartWriter:
    """Fills one part after another; each is finished on disk before the next is begun."""

    def __init__(self, plan: SplitPlan, folder: Path, options: PackOptions, work: JobRange) -> None:
        self._total, self._folder, self._work = len(plan), folder, work
        self._capacity = tar_capacity(options.shard_bytes)
        self._number, self._start, self._position = work.part, work.start, work.start
        self._tar: SampleTar | None = None
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._skipped: list[tuple[int, str]] = []

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tar is not None:
            self._tar.abandon()

    def add(self, rank: int, label: int, data: bytes, info: ImageInfo) -> None:
        if self._tar is not None and self._tar.size + tar_record_size(len(data)) > self._capacity:
            self.end_part()()
        if self._tar is None:
            self._tar = SampleTar(part_tar(self._folder, self._work.job, self._number))
        extension, width, height = info
        offset = self._tar.add(sample_key(rank, self._total), extension, data, label)
        self._rows.append((rank, offset, len(data), width, height))
        self._position += 1

    def skip(self, rank: int, reason: str) -> None:
        self._skipped.append((rank, reason))
        self._position += 1

    def end_part(self) -> Callable[[], None]:
        """Begin a new part; what is returned finishes the present one on disk, and marks it as finished."""
        seal = functools.partial(
            _seal,
            part_tar(self._folder, self._work.job, self._number),
            self._tar,
            Part(self._work.digest, self._start, self._position, len(self._rows), 0, "", self._skipped),
            self._rows,
        )
        self._tar, self._number, self._start = None, self._number + 1, self._position
        self._rows, self._skipped = [], []
        return seal


def _seal(path: Path, tar: SampleTar | None, part: Part, rows: list[tuple[int, int, int, int, int]]) -> None:
    if tar is not None:
        try:
            size, sha256 = tar.finish()
        finally:
            tar.abandon()
        part = replace(part, size=size, sha256=sha256)
    part.save(path, np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS)))
