"""The manifest of a packed split: what it holds, and of every shard and of the index the name, size and SHA-256."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oat_dist.errors import DataError

__all__ = ["Manifest", "ShardInfo"]

FORMAT = "oat-dist-shards"
VERSION = 1
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
            index = manifest.index
            _check_file(path, index["file"], index["size"], index["sha256"])
            for shard in manifest.shards:
                _check_file(path, shard.name, shard.size, shard.sha256)
                if type(shard.samples) is not int or not isinstance(shard.url, str | None):
                    raise TypeError(f"shard {shard.name!r}")
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: damaged manifest ({error}); pack the data set again") from error
        return manifest


def _check_file(path: Path | str, name: str, size: int, sha256: str) -> None:
    if Path(name).name != name:
        raise DataError(f"{path}: {name!r} is not a plain file name; pack the data set again")
    if type(size) is not int or size < 0 or not _SHA256.fullmatch(sha256):
        raise TypeError(f"size or sha256 of {name!r}")
