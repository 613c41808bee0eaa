"""The shard index and manifest: the contract between whoever packs a data set and whoever reads it.

A packed split is a folder of standard tars with two files beside them:

* ``manifest.json``: format and version, classes, counts, and of every shard and of the index the name, size
  and SHA-256. Its own SHA-256, the *digest*, therefore names the exact bytes of the whole split.
* ``index.safetensors``: one row per sample, ordered by sample id (the rank of its source path, 0..n-1):
  ``shard``, ``offset``, ``length``, ``label``, ``width``, ``height``, and the source path as UTF-8 bytes
  (``name_bytes``, cut at ``name_ends``).

Reading a sample needs the index only; the tars stay readable by any WebDataset reader. An index of more than
`READ_LIMIT` bytes is mapped, not read: opening 100 million samples takes no memory. What is checked of a small one when
it is opened (its SHA-256, every row) is checked of a large one where a row is used, and by `verify`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from oat_dist.data.manifest import Manifest, ShardInfo
from oat_dist.data.mapped import Buffer, MalformedError, columns_of, map_file
from oat_dist.data.remote.fetch import NotThereError, fetch_bytes, is_url, join_location, local_path, shown
from oat_dist.data.remote.shard_cache import RemoteFile, ShardCache
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

__all__ = ["INDEX_NAME", "MANIFEST_NAME", "Index", "Manifest", "ShardInfo", "ShardSet", "open_split"]

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.safetensors"
READ_LIMIT = 64 << 20  # about a million samples

# Where the manifest of a remote split may send us, beside where it lies itself.
_REMOTE_SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs")

_ROW_TYPES: dict[str, np.dtype[Any]] = {
    "shard": np.dtype("<u4"),
    "offset": np.dtype("<u8"),
    "length": np.dtype("<u4"),
    "label": np.dtype("<i4"),
    "width": np.dtype("<u4"),
    "height": np.dtype("<u4"),
}
_TYPES: dict[str, np.dtype[Any]] = {**_ROW_TYPES, "name_bytes": np.dtype("u1"), "name_ends": np.dtype("<u8")}


@dataclass(frozen=True)
class Index:
    """Columns of the index, one row per sample id, not writable; `name(i)` is the source path of sample i.

    Of a large index they are mapped: slices and single rows are cheap, whole columns should not be copied.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    width: np.ndarray
    height: np.ndarray
    name_bytes: np.ndarray
    name_ends: np.ndarray

    @classmethod
    def from_rows(cls, rows: dict[str, Sequence[int] | np.ndarray], names: Sequence[str]) -> Index:
        """Build from one sequence per column (keys of the class, without the names) and the names."""
        encoded = [name.encode() for name in names]
        return cls(
            **{key: np.asarray(rows[key], dtype=dtype) for key, dtype in _ROW_TYPES.items()},
            name_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            name_ends=np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        )

    def __len__(self) -> int:
        return len(self.label)

    def name(self, sample_id: int) -> str:
        start = int(self.name_ends[sample_id - 1]) if sample_id > 0 else 0
        return self.name_bytes[start : int(self.name_ends[sample_id])].tobytes().decode(errors="backslashreplace")

    def to_bytes(self) -> bytes:
        return save({key: np.ascontiguousarray(value) for key, value in vars(self).items()})

    @classmethod
    def from_file(cls, path: Path) -> Index:
        """Read or map an index file.

        Raises:
            DataError: a damaged one.
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls.from_bytes(_contents(descriptor), path)
        finally:
            os.close(descriptor)

    @classmethod
    def from_bytes(cls, data: Buffer, path: Path | str) -> Index:
        """An index on these bytes; `path` is what errors call it. Its columns must fit each other.

        Raises:
            DataError: a damaged one.
        """
        try:
            index = cls(**columns_of(data, _TYPES))
            if {len(getattr(index, name)) for name in (*_ROW_TYPES, "name_ends")} != {len(index)}:
                raise MalformedError("columns of unequal length")
            ends = index.name_ends
            if int(ends[-1] if len(ends) else 0) != index.name_bytes.size or (
                len(data) <= READ_LIMIT and np.any(ends[1:] < ends[:-1])
            ):
                raise MalformedError("names do not fit their column")
        except MalformedError as error:
            raise DataError(f"{path}: damaged index ({error}); pack the data set again") from error
        return index


@dataclass(frozen=True)
class ShardSet:
    """An opened split. `digest` is the SHA-256 of its manifest and so names the data exactly.

    `folder` holds manifest and index of a local split; of a remote one it is the cache. `location` is what was opened.
    """

    folder: Path
    manifest: Manifest
    index: Index
    digest: str
    location: str
    cache: ShardCache

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def class_shares(self) -> list[float]:
        """Of all samples, the share that each class has."""
        return [count / self.num_samples for count in self.manifest.class_counts]

    @property
    def where(self) -> str:
        """The location, for messages: a URL without its secrets."""
        return shown(self.location) if is_url(self.location) else self.location

    def place(self, number: int) -> Path | RemoteFile:
        """Where a shard lies: a path, or a URL with what to expect there."""
        return _place(self.location, self.manifest.shards[number])

    def remote_shards(self) -> list[RemoteFile]:
        """The shards that have to be fetched."""
        places = (self.place(number) for number in range(len(self.manifest.shards)))
        return [place for place in places if isinstance(place, RemoteFile)]

    def row(self, sample_id: int) -> tuple[int, int, int]:
        """(shard number, offset, length) of a sample, checked.

        Raises:
            DataError: the index names a shard that there is not, or a place beyond its end.
        """
        index = self.index
        shard, offset, length = index.shard.item(sample_id), index.offset.item(sample_id), index.length.item(sample_id)
        if shard >= len(self.manifest.shards):
            raise DataError(f"{self.where}: {INDEX_NAME} names a shard that the manifest lacks; pack again")
        if offset + length > self.manifest.shards[shard].size:
            raise DataError(f"{self.describe(sample_id)} lies beyond the end of its shard; pack again")
        return shard, offset, length

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for error messages: source path, shard and key."""
        number = int(self.index.shard[sample_id])
        place = self.place(number) if number < len(self.manifest.shards) else f"shard {number}, which there is not"
        where = shown(place.url) if isinstance(place, RemoteFile) else place
        return f"{self.index.name(sample_id)!r} (sample {sample_id}, in {where})"


def open_split(
    location: Path | str, *, cache_dir: Path | str | None = None, cache_limit: int | None = None
) -> ShardSet:
    """Open a packed split; check that index, manifest and shard sizes belong together (no shard checksums).

    Args:
        location: its folder, or the URL of one. Of a URL manifest and index are fetched now, shards when needed.
        cache_dir: where what is fetched is kept; None: $OAT_DIST_CACHE, else ~/.cache/oat_dist.
        cache_limit: most bytes kept there; None: as many as the disk holds.

    Raises:
        DataError: a missing or damaged manifest or index, a local shard that is missing or of another size, an
            index that does not match, a label out of range; a URL that cannot be fetched.
    """
    cache = ShardCache(cache_dir, cache_limit)
    folder = cache.folder if is_url(location) else Path(local_path(location))
    source = str(location) if is_url(location) else str(folder)
    path = _beside(source, MANIFEST_NAME)
    text = _read_manifest(source, folder)
    manifest = Manifest.from_json(text.decode(errors="replace"), path)
    index = _open_index(source, manifest, cache)
    shards = ShardSet(folder, manifest, index, sha256_bytes(text), source, cache)
    _check(shards)
    return shards


def _beside(location: str, name: str) -> str:
    """A file of the split, as messages call it."""
    return shown(join_location(location, name)) if is_url(location) else str(Path(location) / name)


def _read_manifest(location: str, folder: Path) -> bytes:
    if is_url(location):
        try:
            return fetch_bytes(join_location(location, MANIFEST_NAME))
        except NotThereError:
            raise DataError(
                f"{shown(location)}: no packed split there, {MANIFEST_NAME} is missing; check the URL"
            ) from None
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing_split(folder)) from None
    except OSError as error:
        raise DataError(
            f"{folder / MANIFEST_NAME}: cannot be read ({error.strerror}); mend that or pack again"
        ) from None


def _open_index(location: str, manifest: Manifest, cache: ShardCache) -> Index:
    name, size, sha256 = (manifest.index[key] for key in ("file", "size", "sha256"))
    path = _beside(location, name)
    try:
        if is_url(location):
            descriptor = cache.open(RemoteFile(_remote_target(location, name, name), size, sha256))
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = _contents(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DataError(f"{path}: the index is missing; pack the data set again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend that or pack again") from None
    if len(data) != size or (isinstance(data, bytes) and sha256_bytes(data) != sha256):
        raise DataError(
            f"{path}: the index does not match {_beside(location, MANIFEST_NAME)}; "
            "restore both from one packing, or pack again"
        )
    return Index.from_bytes(data, path)


def _contents(descriptor: int) -> Buffer:
    """All of an open file: read if it is small, else mapped."""
    size = os.fstat(descriptor).st_size
    if size > READ_LIMIT:
        return map_file(descriptor, size)
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _place(location: str, shard: ShardInfo) -> Path | RemoteFile:
    target = shard.name if shard.url is None else shard.url
    if not is_url(target) and not is_url(location):
        return Path(location) / local_path(target)
    if is_url(location):
        target = _remote_target(location, shard.name, target)
    return RemoteFile(target, shard.size, shard.sha256)


def _remote_target(location: str, name: str, target: str) -> str:
    """The URL of what the manifest of a remote split names; it must not reach into this machine."""
    manifest, again = _beside(location, MANIFEST_NAME), "index the shards again by their URLs"
    if "::" in target:  # fsspec would open one protocol through another
        raise DataError(f"{manifest}: {name} is said to lie at {shown(target)}: '::' is not allowed there; {again}")
    if is_url(target):
        own, scheme = (url.partition("://")[0].lower() for url in (location, target))
        if scheme not in (*_REMOTE_SCHEMES, own):
            allowed = ", ".join(dict.fromkeys((*_REMOTE_SCHEMES, own)))
            raise DataError(
                f"{manifest}: shard {name} lies at {shown(target)}: the manifest of this remote split may name only "
                f"URLs of {allowed}; {again}"
            )
        return target
    if local_path(target) != target or Path(target).is_absolute():
        raise DataError(
            f"{manifest}: shard {name} lies in a local folder ({target}), which the manifest of a remote split may not "
            f"name; {again}"
        )
    return join_location(location, target)


def _missing_split(folder: Path) -> str:
    if not folder.is_dir():
        parent = folder.parent
        there = sorted(p.parent.name for p in parent.glob(f"*/{MANIFEST_NAME}")) if parent.is_dir() else []
        hint = f"{parent} holds {', '.join(there)}" if there else "pack a data set first (shards/pack.py)"
        return f"{folder}: no such packed split; {hint}"
    return f"{folder}: not a packed split, {MANIFEST_NAME} is missing; pack it with shards/pack.py"


def _check(shards: ShardSet) -> None:
    manifest, index = shards.manifest, shards.index
    if len(index) != manifest.num_samples:
        raise DataError(
            f"{shards.where}: the index lists {len(index)} samples, the manifest {manifest.num_samples}; pack again"
        )
    for number, shard in enumerate(manifest.shards):
        place = shards.place(number)
        if isinstance(place, RemoteFile):
            shards.cache.check(place)
            continue
        try:
            size = place.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{place}: the shard is missing; restore it or pack again") from None
        except OSError as error:
            raise DataError(
                f"{place}: the shard cannot be opened ({error.strerror}); mend that or pack again"
            ) from None
        if size != shard.size:
            raise DataError(
                f"{place}: the shard has {size:,} bytes, the manifest says {shard.size:,}; "
                "it was cut short or replaced: restore it or pack again"
            )
    if manifest.index["size"] <= READ_LIMIT and len(index):
        _check_rows(shards)


def _check_rows(shards: ShardSet) -> None:
    """Every label and every place."""
    manifest, index = shards.manifest, shards.index
    if int(index.shard.max()) >= len(manifest.shards):
        raise DataError(f"{shards.where}: {INDEX_NAME} names a shard that the manifest lacks; pack again")
    if int(index.label.min()) < 0 or int(index.label.max()) >= len(manifest.classes):
        bad = int(np.flatnonzero((index.label < 0) | (index.label >= len(manifest.classes)))[0])
        raise DataError(
            f"{shards.describe(bad)}: label {int(index.label[bad])} is out of range for "
            f"{len(manifest.classes)} classes; mend the labels and pack again"
        )
    sizes = np.array([shard.size for shard in manifest.shards], dtype=np.uint64)
    # No sum: it could wrap around.
    beyond = (index.length > sizes[index.shard]) | (index.offset > sizes[index.shard] - index.length)
    if beyond.any():
        raise DataError(f"{shards.describe(int(beyond.argmax()))} lies beyond the end of its shard; pack again")
