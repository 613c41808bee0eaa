"""The shard index and manifest: the contract between whoever packs a data set and whoever reads it.

A packed split is a folder of standard tars with two files beside them:

* ``manifest.json``: format and version, classes, counts, and of every shard and of the index the name, size
  and SHA-256. Its own SHA-256, the *digest*, therefore names the exact bytes of the whole split.
* ``index.safetensors``: one row per sample, ordered by sample id (the rank of its source path, 0..n-1):
  ``shard``, ``offset``, ``length``, ``label``, ``width``, ``height``, and the source path as UTF-8 bytes
  (``name_bytes``, cut at ``name_ends``).

Reading a sample needs the index only; the tars stay readable by any WebDataset reader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

__all__ = ["INDEX_NAME", "MANIFEST_NAME", "Index", "Manifest", "ShardInfo", "ShardSet", "open_split"]

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.safetensors"
FORMAT = "oat-dist-shards"
VERSION = 1

_COLUMNS = {
    "shard": np.uint32,
    "offset": np.uint64,
    "length": np.uint32,
    "label": np.int32,
    "width": np.uint32,
    "height": np.uint32,
}


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a split: file name, number of samples, size in bytes, SHA-256 in hex."""

    name: str
    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a split holds. `class_counts[k]` counts the samples whose label is k, `classes[k]` is its name.

    `num_bytes` sums the images without the tars around them. `image_sizes` has "min", "median" and "max" as
    [width, height], either side by itself. `skipped` lists name and reason of images left out as unreadable.
    """

    split: str
    source: str
    seed: int
    classes: list[str]
    class_counts: list[int]
    num_samples: int
    num_bytes: int
    image_sizes: dict[str, list[int]]
    shards: list[ShardInfo]
    index: dict[str, Any]
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT or values.pop("version") != VERSION:
                raise DataError(f"{path}: no {FORMAT} manifest of version {VERSION}; pack the data set again")
            values["shards"] = [ShardInfo(**shard) for shard in values["shards"]]
            for name in (values["index"]["file"], *(shard.name for shard in values["shards"])):
                if Path(name).name != name:
                    raise DataError(f"{path}: {name!r} is not a plain file name; pack the data set again")
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: damaged manifest ({error}); pack the data set again") from error


@dataclass(frozen=True)
class Index:
    """Columns of the index, one row per sample id; `names[i]` is the source path of sample i."""

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
            **{key: np.asarray(rows[key], dtype=dtype) for key, dtype in _COLUMNS.items()},
            name_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            name_ends=np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        )

    def __len__(self) -> int:
        return len(self.label)

    def name(self, sample_id: int) -> str:
        start = int(self.name_ends[sample_id - 1]) if sample_id > 0 else 0
        return self.name_bytes[start : int(self.name_ends[sample_id])].tobytes().decode()

    def to_bytes(self) -> bytes:
        return save({key: np.ascontiguousarray(value) for key, value in vars(self).items()})

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Index:
        try:
            index = cls(**load(data))
        except (SafetensorError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged index ({error}); pack the data set again") from error
        columns = {**_COLUMNS, "name_ends": np.uint64}
        shapes = {getattr(index, name).shape for name in columns}
        if shapes != {(len(index),)} or any(getattr(index, key).dtype != kind for key, kind in columns.items()):
            raise DataError(f"{path}: damaged index (columns of unequal length or wrong type); pack again")
        ends = index.name_ends
        if np.any(ends[1:] < ends[:-1]) or (len(ends) and int(ends[-1]) != index.name_bytes.size):
            raise DataError(f"{path}: damaged index (names do not fit their column); pack the data set again")
        return index


@dataclass(frozen=True)
class ShardSet:
    """An opened split. `digest` is the SHA-256 of its manifest and so names the data exactly."""

    folder: Path
    manifest: Manifest
    index: Index
    digest: str

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    def __len__(self) -> int:
        return self.manifest.num_samples

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for error messages: source path, shard and key."""
        shard = self.manifest.shards[int(self.index.shard[sample_id])].name
        return f"{self.index.name(sample_id)!r} (sample {sample_id}, in {self.folder / shard})"


def open_split(folder: Path | str) -> ShardSet:
    """Open a packed split; check that index, manifest and shard sizes belong together (no shard checksums).

    Raises:
        DataError: a missing or damaged manifest or index, a shard that is missing or of another size, an
            index that does not match, a label out of range.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing_split(folder)) from None
    manifest = Manifest.from_json(text.decode(errors="replace"), path)
    index_path = folder / manifest.index["file"]
    try:
        data = index_path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{index_path}: the index is missing; pack the data set again") from None
    if sha256_bytes(data) != manifest.index["sha256"]:
        raise DataError(f"{index_path}: the index does not match {path}; restore both from one packing, or pack again")
    index = Index.from_bytes(data, index_path)
    shards = ShardSet(folder, manifest, index, sha256_bytes(text))
    _check(shards)
    return shards


def _missing_split(folder: Path) -> str:
    if not folder.is_dir():
        parent = folder.parent
        there = sorted(p.parent.name for p in parent.glob(f"*/{MANIFEST_NAME}")) if parent.is_dir() else []
        hint = f"{parent} holds {', '.join(there)}" if there else "pack a data set first (shards/pack.py)"
        return f"{folder}: no such packed split; {hint}"
    return f"{folder}: not a packed split, {MANIFEST_NAME} is missing; pack it with shards/pack.py"


def _check(shards: ShardSet) -> None:
    manifest, index, folder = shards.manifest, shards.index, shards.folder
    if len(index) != manifest.num_samples:
        raise DataError(
            f"{folder}: the index lists {len(index)} samples, the manifest {manifest.num_samples}; pack again"
        )
    for shard in manifest.shards:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError:
            raise DataError(f"{folder / shard.name}: the shard is missing; restore it or pack again") from None
        if size != shard.size:
            raise DataError(
                f"{folder / shard.name}: the shard has {size:,} bytes, the manifest says {shard.size:,}; "
                "it was cut short or replaced: restore it or pack again"
            )
    if len(index):
        if int(index.label.min()) < 0 or int(index.label.max()) >= len(manifest.classes):
            bad = int(np.flatnonzero((index.label < 0) | (index.label >= len(manifest.classes)))[0])
            raise DataError(
                f"{shards.describe(bad)}: label {int(index.label[bad])} is out of range for "
                f"{len(manifest.classes)} classes; mend the labels and pack again"
            )
        if int(index.shard.max()) >= len(manifest.shards):
            raise DataError(f"{folder / INDEX_NAME}: names a shard that the manifest lacks; pack again")
        ends = index.offset + index.length
        sizes = np.array([shard.size for shard in manifest.shards], dtype=np.uint64)
        if bool((ends > sizes[index.shard]).any()):
            raise DataError(f"{folder / INDEX_NAME}: a sample lies beyond the end of its shard; pack again")
