"""One split while it is checked: its report, its manifest and index, and the check of each of its shards."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oat_dist.data.foreign.parts import sample_name
from oat_dist.data.foreign.place import rules_of
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.index import MANIFEST_NAME, Index, Manifest, ShardSet, open_split
from oat_dist.data.integrity.leakage import Hashes, Overlap
from oat_dist.data.integrity.split_list import split_name
from oat_dist.data.integrity.verify_index import PackedKeys, ShardRows, compare_with_manifest, empty_classes
from oat_dist.data.integrity.verify_shard import Expected, compare_file, compare_samples
from oat_dist.data.remote.fetch import is_url
from oat_dist.data.remote.shard_cache import RemoteFile, ShardCache
from oat_dist.data.tars.examine import decoded, unexamined
from oat_dist.data.tars.shard_scan import scan_shard
from oat_dist.data.tars.tarsamples import ShardScan
from oat_dist.data.workers import Advance
from oat_dist.errors import DataError
from oat_dist.files import sha256_file

__all__ = ["Leak", "Problem", "SplitCheck", "SplitReport"]

_LISTED_PER_SHARD = 1000


class Problem(NamedTuple):
    """What is wrong, and in which file (and sample)."""

    where: str
    what: str


class Leak(NamedTuple):
    """Images of this split that are also in split `other`; `examples` names those of `other` first."""

    other: str
    overlap: Overlap
    examples: list[tuple[str, str]]


@dataclass
class SplitReport:
    """What a split's manifest says it holds (None: unreadable), and what is wrong with it.

    Attributes:
        problems: damage.
        notes: what is odd and no damage.
        copies: images that are there before within the split; None: not known, for want of an index.
        copy_examples: names of such images, each after the first one of its kind.
        leaks: images that are in another split too; of two splits the smaller one has the report.
    """

    name: str
    manifest: Manifest | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    copies: Overlap | None = None
    copy_examples: list[tuple[str, str]] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.problems.append(Problem(f"{self.name}/{where}", what))


class SplitCheck:
    """A split while it is checked. What the checks of its shards share lies in memory that forked processes share."""

    def __init__(self, location: str) -> None:
        self.shards: ShardSet | None = None
        self.rules: Rules | None = None
        self.report = SplitReport(split_name(location))
        manifest, index = _open(location, self.report)
        self.index = index
        self.report.manifest = manifest
        if manifest is None:
            return
        empty = Index.from_rows(dict.fromkeys(("shard", "offset", "length", "label", "width", "height"), ()), [])
        self.shards = ShardSet(Path(location), manifest, empty if index is None else index, "", location, ShardCache())
        try:
            self.rules = rules_of(manifest)
        except DataError as error:
            self.report.add(MANIFEST_NAME, str(error))
        packed = self.rules is None
        for name in empty_classes(manifest):
            if packed:
                self.report.add(MANIFEST_NAME, f"empty class: {name!r} has no image")
            else:
                self.report.notes.append(Problem(f"{self.report.name}/{MANIFEST_NAME}", f"class {name!r} is empty"))
        if packed and not is_url(location):
            listed = {shard.name for shard in manifest.shards if shard.url is None}
            for extra in sorted({path.name for path in Path(location).glob("*.tar")} - listed):
                self.report.add(extra, "not in the manifest, yet readers of *.tar would use it; remove it")
        if index is not None:
            for where, what in compare_with_manifest(manifest, index, packed=packed):
                self.report.add(where, what)
            self.rows = ShardRows(index, len(manifest.shards))
            self.keys = PackedKeys(index, [bad["name"] for bad in manifest.skipped]) if packed else None
            image = _shared(2 * len(index), np.uint64).reshape(-1, 2)
            self.hashes = Hashes(image, _shared(len(index), np.uint32), index.label)

    def check_shard(self, number: int, decode: bool, threads: int, advance: Advance) -> list[tuple[str, str]]:
        """(where, what) of all that is wrong with a shard. Fills in the hashes of its images."""
        assert self.shards is not None
        shard = self.shards.manifest.shards[number]
        left = shard.samples

        def count(n: int) -> None:
            nonlocal left
            advance(min(n, left))
            left -= min(n, left)

        again = "pack again" if self.rules is None else "index the shards again"
        try:
            place = self.shards.place(number)
            location = place.url if isinstance(place, RemoteFile) else str(place)
            examine = decoded if decode else unexamined
            scan = scan_shard(location, self.rules or Rules(), examine, threads=threads, advance=count)
        except FileNotFoundError:
            return [(shard.name, f"the shard is missing; restore it or {again}")]
        except DataError as error:
            return [(shard.name, str(error))]
        finally:
            advance(left)
        found = [(shard.name, text) for text in compare_file(scan, shard, shard.samples, again)]
        if self.index is not None:
            found += self._check_samples(scan, number, decode)
        if len(found) > _LISTED_PER_SHARD:
            more = len(found) - _LISTED_PER_SHARD
            found = [*found[:_LISTED_PER_SHARD], (shard.name, f"... and {more:,} more problems in this shard")]
        return found

    def _check_samples(self, scan: ShardScan, number: int, decode: bool) -> list[tuple[str, str]]:
        assert self.index is not None and self.shards is not None
        shard, rows = self.shards.manifest.shards[number], self.rows.of(number)
        if self.keys is not None:
            keys, names = self.keys.of(rows), scan.keys
        else:
            keys, names = [self.index.name(i) for i in rows.tolist()], [sample_name(shard.name, k) for k in scan.keys]
        expected = Expected(
            self.index, rows, keys, self.shards.classes, self.rules or Rules(), self.rules is None, decode
        )
        position, problems = compare_samples(scan, names, expected)
        matched = position >= 0
        self.hashes.image[rows[matched]] = scan.hash[position[matched]]
        self.hashes.crc[rows[matched]] = scan.crc[position[matched]]
        return [(shard.name if i < 0 else f"{shard.name}: {self.index.name(i)!r}", what) for i, what in problems]


def _open(location: str, report: SplitReport) -> tuple[Manifest | None, Index | None]:
    """Both, or what is wrong with them."""
    if is_url(location):
        try:
            shards = open_split(location)
            return shards.manifest, shards.index
        except DataError as error:
            report.add(MANIFEST_NAME, str(error))
            return None, None
    folder, path = Path(location), Path(location) / MANIFEST_NAME
    try:
        manifest = Manifest.from_json(path.read_bytes().decode(errors="replace"), path)
    except FileNotFoundError:
        report.add(MANIFEST_NAME, "the manifest is missing; restore it or pack again")
        return None, None
    except DataError as error:
        report.add(MANIFEST_NAME, str(error).removeprefix(f"{path}: "))
        return None, None
    name = manifest.index["file"]
    try:
        if sha256_file(folder / name) == manifest.index["sha256"]:
            return manifest, Index.from_file(folder / name)
        report.add(name, "does not match the manifest; restore both from one packing, or pack again")
    except FileNotFoundError:
        report.add(name, "the index is missing; restore it or pack again")
    except DataError as error:
        report.add(name, str(error).removeprefix(f"{folder / name}: "))
    return manifest, None


def _shared(count: int, kind: type[np.generic]) -> np.ndarray:
    """Zeros that forked processes write to as well."""
    return np.frombuffer(mmap.mmap(-1, max(1, np.dtype(kind).itemsize * count)), dtype=kind, count=count)
