"""Writes labelled images into shards: the walk of one sample.

1. Samples are sorted by name; the rank in that order is the sample's key, zero-padded (`00000042`).
2. They are read, decoded and measured in threads, in a seeded random order; the bytes are kept as they are.
3. In that order they go through `webdataset.TarWriter` into standard tars: `key.jpg` (.png, ...), `key.cls`.
4. Each finished tar is read back: it must hold what was meant, and it gives the offsets of the index.
5. Index and manifest are written, everything is synced, and the hidden folder gets its name (`staging`).

The sample id is the rank among the samples written: equal to the key unless unreadable images were skipped.
The same input gives the same bytes of every file: no time, no user, no path of this machine is written.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import webdataset

from oat_dist.data.imagecheck import ImageInfo, check_image
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest, ShardInfo, ShardSet, open_split
from oat_dist.data.ordered_map import default_workers, ordered_map
from oat_dist.data.progress import show_progress
from oat_dist.data.samples import (
    AnySample,
    Sample,
    class_names,
    class_numbers,
    refuse_empty_class,
    sample_key,
    seeded_order,
    sorted_samples,
)
from oat_dist.data.staging import staged_folders
from oat_dist.data.tarscan import scan_tar
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes, sha256_file, write_atomic

__all__ = ["image_size_range", "write_shards", "write_splits"]

OnBad = Literal["stop", "skip"]

_SHARD_BYTES = 256 << 20
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAR_BLOCK, _TAR_RECORD = 512, 10240


def write_shards(
    samples: Iterable[AnySample],
    output: Path | str,
    *,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    source: str = "custom",
    seed: int = 0,
    shard_samples: int = 10_000,
    shard_bytes: int = _SHARD_BYTES,
    on_bad: OnBad = "stop",
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ShardSet:
    """Pack `samples` into the split folder `output` (`.../train`), which appears whole or not at all.

    Only the list of samples is held in memory: give paths or callables rather than bytes for a large set.

    Args:
        samples: `Sample`s, or plain tuples (name, label, data).
        output: folder of the split; its parent is locked against a second packer meanwhile.
        classes: class names by label. Default: the distinct text labels sorted, or "0".."max" for numbers.
        split: name of the split, the start of the shards' file names. Default: the last part of `output`.
        source: a word for the manifest, where the data came from.
        seed: decides the order of the samples in the shards.
        shard_samples: samples per shard, at most.
        shard_bytes: size of a shard in bytes, at most (a single larger image gets a shard of its own).
        on_bad: "stop" at an image that cannot be decoded, or "skip" it and list it in `manifest.skipped`.
        overwrite: replace a packed split already there, once the new one is complete.
        workers: threads that read and decode; default: one per core, at most 16.
        progress: show progress on stderr.

    Raises:
        DataError: see its text; nothing has been written then.
        OatError: another process is packing into the same parent folder.
    """
    folder = Path(output).resolve()
    options = _Options(
        source, seed, shard_samples, shard_bytes, on_bad, overwrite, workers or default_workers(), progress
    )
    return _pack(folder.parent, {folder.name: (split or folder.name, samples)}, classes, options)[0]


def write_splits(
    splits: Mapping[str, Iterable[Sample]],
    output: Path | str,
    *,
    classes: Sequence[str] | None = None,
    source: str = "custom",
    seed: int = 0,
    shard_samples: int = 10_000,
    shard_bytes: int = _SHARD_BYTES,
    on_bad: OnBad = "stop",
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, ShardSet]:
    """Pack several splits with one class list into `output/<split>`; none appears before all are written.

    Arguments and errors as for `write_shards`.
    """
    options = _Options(
        source, seed, shard_samples, shard_bytes, on_bad, overwrite, workers or default_workers(), progress
    )
    folders = {name: (name, samples) for name, samples in splits.items()}
    packed = _pack(Path(output).resolve(), folders, classes, options)
    return dict(zip(splits, packed, strict=True))


def image_size_range(widths: np.ndarray, heights: np.ndarray) -> dict[str, list[int]]:
    """`{"min": [w, h], "median": [w, h], "max": [w, h]}`, width and height each by itself."""
    sides = np.stack([widths, heights])
    return {
        "min": sides.min(axis=1).tolist(),
        "median": np.sort(sides, axis=1)[:, (sides.shape[1] - 1) // 2].tolist(),
        "max": sides.max(axis=1).tolist(),
    }


@dataclass(frozen=True)
class _Options:
    source: str
    seed: int
    shard_samples: int
    shard_bytes: int
    on_bad: OnBad
    overwrite: bool
    workers: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("shard_samples", "shard_bytes", "workers"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.on_bad not in ("stop", "skip"):
            raise DataError(f'on_bad is {self.on_bad!r}; it must be "stop" or "skip"')


def _pack(
    parent: Path,
    splits: Mapping[str, tuple[str, Iterable[AnySample]]],
    classes: Sequence[str] | None,
    options: _Options,
) -> list[ShardSet]:
    """Pack each `folder name -> (split name, samples)` into `parent`."""
    for split, _ in splits.values():
        if not _SPLIT_NAME.fullmatch(split):
            raise DataError(f"split name {split!r}: use letters, digits, '.', '_' and '-' only (it names the shards)")
    samples = [sorted_samples(split, given) for split, given in splits.values()]
    names = class_names(classes, samples)
    labels = [class_numbers(split, part, names) for (split, _), part in zip(splits.values(), samples, strict=True)]
    with staged_folders(parent, list(splits), overwrite=options.overwrite) as folders:
        for folder, (split, _), part, part_labels in zip(folders, splits.values(), samples, labels, strict=True):
            _write_split(folder, split, part, part_labels, names, options)
    return [open_split(parent / name) for name in splits]


class _Checked(NamedTuple):
    """A sample that has been read: bytes and kind, or the reason why it cannot be used."""

    rank: int
    data: bytes
    info: ImageInfo | None
    reason: str


def _check_sample(sample: Sample, rank: int) -> _Checked:
    try:
        if isinstance(sample.data, (str, os.PathLike)):
            data = Path(sample.data).read_bytes()
        else:
            data = sample.data() if callable(sample.data) else sample.data
        if not isinstance(data, bytes):
            raise DataError(
                f"the data is of type {type(data).__name__}; give bytes, a path, or a callable giving bytes"
            )
        return _Checked(rank, data, check_image(data), "")
    except OSError as error:
        return _Checked(rank, b"", None, error.strerror or type(error).__name__)
    except DataError as error:
        return _Checked(rank, b"", None, str(error))


def _write_split(
    folder: Path, split: str, samples: list[Sample], labels: np.ndarray, classes: list[str], options: _Options
) -> None:
    total = len(samples)
    order = seeded_order([sample_key(rank, total) for rank in range(total)], options.seed)
    columns = {name: np.zeros(total, dtype=np.int64) for name in ("shard", "offset", "length", "width", "height")}
    kept = np.zeros(total, dtype=bool)
    skipped: list[dict[str, str]] = []
    with (
        _thread_pool(options.workers) as pool,
        _ShardWriter(folder, split, options, pool) as writer,
        show_progress(f"packing {split}", total, enabled=options.progress) as advance,
    ):
        checked = ordered_map(
            pool,
            lambda rank: _check_sample(samples[rank], rank),
            order,
            workers=options.workers,
            size=lambda result: len(result.data),
        )
        for rank, data, info, reason in checked:
            advance(1)
            if info is None:
                if options.on_bad == "stop":
                    raise DataError(_unreadable(samples[rank], split, reason))
                skipped.append({"name": samples[rank].name, "reason": reason})
                continue
            shard = writer.add(sample_key(rank, total), info.extension, data, int(labels[rank]))
            kept[rank] = True
            columns["shard"][rank], columns["length"][rank] = shard, len(data)
            columns["width"][rank], columns["height"][rank] = info.width, info.height
        shards, offsets = writer.finish()
    columns["offset"][list(offsets)] = list(offsets.values())
    counts = np.bincount(labels[kept], minlength=len(classes))
    refuse_empty_class(split, counts, classes, "has no readable image")

    rows: dict[str, Sequence[int] | np.ndarray] = {name: column[kept] for name, column in columns.items()}
    index = Index.from_rows({**rows, "label": labels[kept]}, [samples[i].name for i in np.flatnonzero(kept)]).to_bytes()
    manifest = Manifest(
        split=split,
        source=options.source,
        seed=options.seed,
        classes=classes,
        class_counts=counts.tolist(),
        num_samples=int(kept.sum()),
        num_bytes=int(columns["length"].sum()),
        image_sizes=image_size_range(columns["width"][kept], columns["height"][kept]),
        shards=shards,
        index={"file": INDEX_NAME, "size": len(index), "sha256": sha256_bytes(index)},
        skipped=sorted(skipped, key=operator.itemgetter("name")),
    )
    write_atomic(folder / INDEX_NAME, index)
    write_atomic(folder / MANIFEST_NAME, manifest.to_json())


def _unreadable(sample: Sample, split: str, reason: str) -> str:
    where = sample.data if isinstance(sample.data, os.PathLike) else f"split {split!r}, sample {sample.name!r}"
    return (
        f"{where}: unreadable image ({reason}); mend or remove it, or leave such images out and list them "
        'with --on-bad skip (on_bad="skip")'
    )


@contextlib.contextmanager
def _thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that, on an error, drops what it has not begun instead of finishing it first."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """Fills one tar after another; each finished one is read back and hashed in the pool."""

    def __init__(self, folder: Path, split: str, options: _Options, pool: ThreadPoolExecutor) -> None:
        self._folder, self._split, self._options, self._pool = folder, split, options, pool
        self._sealed: list[Future[tuple[ShardInfo, dict[int, int]]]] = []
        self._file: BinaryIO | None = None
        self._size = 0
        self._wanted: dict[str, int] = {}

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:  # an error is on its way: only let go of the file
            with contextlib.suppress(OSError):
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, key: str, extension: str, data: bytes, label: int) -> int:
        """Write one sample, in a new shard if need be; returns the shard's number."""
        text = str(label).encode()
        size = 2 * _TAR_BLOCK + sum(-(-len(part) // _TAR_BLOCK) * _TAR_BLOCK for part in (data, text))
        trailer = 2 * _TAR_BLOCK
        if self._file is not None:
            full = -(-(self._size + size + trailer) // _TAR_RECORD) * _TAR_RECORD > self._options.shard_bytes
            if full or len(self._wanted) // 2 == self._options.shard_samples:
                self._close()
        if self._file is None:
            self._path = self._folder / f"{self._split}-{len(self._sealed):06d}.tar"
            self._file = self._path.open("wb", buffering=1 << 20)
            # encoder=False: all we write is bytes already
            self._tar = webdataset.TarWriter(self._file, mtime=0, encoder=False)
            self._size, self._wanted = 0, {}
        self._tar.write({"__key__": key, extension: data, "cls": text})
        self._size += size
        self._wanted[f"{key}.{extension}"], self._wanted[f"{key}.cls"] = len(data), len(text)
        return len(self._sealed)

    def finish(self) -> tuple[list[ShardInfo], dict[int, int]]:
        """All shards, and the offset of every image by rank."""
        if self._file is not None:
            self._close()
        shards: list[ShardInfo] = []
        offsets: dict[int, int] = {}
        for future in self._sealed:
            shard, found = future.result()
            shards.append(shard)
            offsets.update(found)
        return shards, offsets

    def _close(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._sealed.append(self._pool.submit(_seal, self._path, self._wanted))


def _seal(path: Path, wanted: dict[str, int]) -> tuple[ShardInfo, dict[int, int]]:
    """Read a finished tar back: its checksum, and the offset of each image by rank."""
    members = scan_tar(path)
    if {member.name: member.size for member in members} != wanted or len(members) != len(wanted):
        raise DataError(f"{path}: reads back otherwise than it was written; check the disk and pack again")
    offsets = {int(stem): m.offset for m in members for stem, _, kind in [m.name.partition(".")] if kind != "cls"}
    return ShardInfo(path.name, len(offsets), path.stat().st_size, sha256_file(path)), offsets
