"""The manifest of a packed split: what it holds, and of every shard and of the index the name, size and SHA-256."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oat_dist.errors import DataError

__all__ = ["Manifest", "ShardInfo"]

FORMAT = "oat-dist-shards"
VERSION = 1
_NAME_BYTES = 255  # most that a file system takes
_MOST = 2**63 - 1  # bytes of a file
_SHA256 = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a split: file name, number of samples, size in bytes, SHA-256 in hex ("": not known).

    `url` says where it lies when not beside the manifest: an fsspec URL or a path, relative to the manifest's folder.
    """

    name: str
    samples: int
    size: int
    sha256: str
    url: str | None = None


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
        for shard in values["shards"]:
            if shard["url"] is None:
                del shard["url"]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path | str) -> Manifest:
        """Read a manifest; `path` is what errors call it.

        Raises:
            DataError: damaged, of another version, or naming files that are no plain file names.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT or values.pop("version") != VERSION:
                raise DataError(f"{path}: no {FORMAT} manifest of version {VERSION}; pack the data set again")
            values["shards"] = [ShardInfo(**shard) for shard in values["shards"]]
            manifest = cls(**values)
            _check_values(manifest)
            index = manifest.index
            _check_file(index["file"], index["size"], index["sha256"])
            for shard in manifest.shards:
                _check_file(shard.name, shard.size, shard.sha256)
                if not _is_count(shard.samples) or not (shard.url is None or _is_place(shard.url)):
                    raise TypeError(f"samples or url of shard {shard.name!r}")
        except (
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            ValueError,
        ) as error:  # also numbers of 5,000 digits
            raise DataError(f"{path}: damaged manifest ({error}); pack the data set again") from error
        return manifest


def _check_values(manifest: Manifest) -> None:
    classes = manifest.classes
    if not _is_list(classes, str) or len(set(classes)) < len(classes):
        raise TypeError("classes are not different names")
    if not isinstance(manifest.class_counts, list) or not all(map(_is_count, manifest.class_counts)):
        raise TypeError("class_counts are not numbers")
    if len(manifest.class_counts) != len(classes):
        raise TypeError(f"{len(manifest.class_counts)} class_counts of {len(classes)} classes")
    for name in ("num_samples", "num_bytes"):
        if not _is_count(getattr(manifest, name)):
            raise TypeError(f"{name} is no number")
    sizes = manifest.image_sizes
    if not isinstance(sizes, dict) or not all(_is_list(side, int) and len(side) == 2 for side in sizes.values()):
        raise TypeError("image_sizes")
    skipped = manifest.skipped
    if not _is_list(skipped, dict) or not all(_is_list([bad["name"], bad["reason"]], str) for bad in skipped):
        raise TypeError("skipped")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_place(value: object) -> bool:
    return isinstance(value, str) and bool(os.fsencode(value)) and "\0" not in value


def _check_file(name: str, size: int, sha256: str) -> None:
    if not _is_place(name) or name == ".." or Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    if len(os.fsencode(name)) > _NAME_BYTES:
        raise ValueError(f"a file name of more than {_NAME_BYTES} bytes, {name[:20]!r}...")
    if not _is_count(size) or not _SHA256.fullmatch(sha256):
        raise TypeError(f"size or sha256 of {name!r}")
