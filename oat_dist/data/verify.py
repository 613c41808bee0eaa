"""Checks packed splits from the manifest down to every image, and lists all problems instead of the first.

1. The manifest is read, and its numbers are compared with the index, whose digest it holds.
2. Every shard must be there, with its size and SHA-256; a tar unknown to the manifest is a problem too.
3. The members of every tar are compared with the index: key, place, size, label.
4. Every image is decoded and measured.
5. All splits must have the same classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oat_dist.data.imagecheck import check_image
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest, ShardInfo
from oat_dist.data.ordered_map import default_workers, ordered_map
from oat_dist.data.packing import image_size_range
from oat_dist.data.progress import show_progress
from oat_dist.data.samples import sample_key
from oat_dist.data.tarscan import TarMember, scan_tar
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes, sha256_file

__all__ = ["Problem", "SplitReport", "verify_output"]


class Problem(NamedTuple):
    """What is wrong, and in which file (and sample)."""

    where: str
    what: str


@dataclass
class SplitReport:
    """What a split's manifest says it holds (None: unreadable), and what is wrong with it."""

    name: str
    manifest: Manifest | None = None
    problems: list[Problem] = field(default_factory=list)

    def add(self, where: Path | str, what: str) -> None:
        place = f"{self.name}/{where.name}" if isinstance(where, Path) else f"{self.name}/{where}"
        self.problems.append(Problem(place, what))


def verify_output(
    output: Path | str, *, decode: bool = True, workers: int | None = None, progress: bool = False
) -> list[SplitReport]:
    """Check all splits in the folder `output`, or `output` itself when it is one.

    Args:
        decode: decode every image too (the slow part).

    Raises:
        DataError: there is no split to check.
    """
    output = Path(output)
    folders = _find_splits(output)
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        reports = [_verify_split(folder, pool, workers or default_workers(), decode, progress) for folder in folders]
    known = [report for report in reports if report.manifest]
    for report in known[1:]:
        first, this = known[0].manifest, report.manifest
        assert first and this
        if this.classes != first.classes:
            report.add(
                MANIFEST_NAME,
                f"its classes are not those of split {known[0].name!r}; pack all splits together",
            )
    return reports


def _find_splits(output: Path) -> list[Path]:
    if not output.is_dir():
        raise DataError(f"{output}: no such folder; give what pack was given as OUTPUT, or one split in it")
    if _looks_packed(output):
        return [output]
    folders = [entry for entry in sorted(output.iterdir()) if not entry.name.startswith(".") and _looks_packed(entry)]
    if not folders:
        raise DataError(f"{output}: holds no packed split; pack a data set first (shards/pack.py)")
    return folders


def _looks_packed(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).exists() for name in (MANIFEST_NAME, INDEX_NAME)) or any(folder.glob("*.tar"))
    )


def _verify_split(folder: Path, pool: ThreadPoolExecutor, workers: int, decode: bool, progress: bool) -> SplitReport:
    report = SplitReport(folder.resolve().name)
    path = folder / MANIFEST_NAME
    try:
        report.manifest = manifest = Manifest.from_json(path.read_bytes().decode(errors="replace"), path)
    except FileNotFoundError:
        report.add(path, "the manifest is missing; restore it or pack again")
        return report
    except DataError as error:
        report.add(path, str(error).removeprefix(f"{path}: "))
        return report
    index = _read_index(folder, manifest, report)
    if index is not None:
        _compare_with_manifest(manifest, index, report)
    for extra in sorted({p.name for p in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}):
        report.add(extra, "not in the manifest, yet readers of *.tar would use it; remove it")
    samples = _samples_by_shard(manifest, index)
    keys = _keys(manifest, index) if index is not None else []
    with show_progress(f"verifying {report.name}", manifest.num_samples, enabled=progress) as advance:
        for shard, rows in zip(manifest.shards, samples, strict=True):
            _verify_shard(folder / shard.name, shard, report)
            if index is not None and (folder / shard.name).is_file():
                _verify_members(folder / shard.name, keys, index, rows, report)
                if decode:
                    for problem in _undecodable(folder / shard.name, index, rows, pool, workers):
                        report.add(*problem)
            advance(shard.samples)
    return report


def _read_index(folder: Path, manifest: Manifest, report: SplitReport) -> Index | None:
    path = folder / manifest.index["file"]
    try:
        data = path.read_bytes()
        if sha256_bytes(data) != manifest.index["sha256"]:
            report.add(path, "does not match the manifest; restore both from one packing, or pack again")
            return None
        return Index.from_bytes(data, path)
    except FileNotFoundError:
        report.add(path, "the index is missing; restore it or pack again")
    except DataError as error:
        report.add(path, str(error).removeprefix(f"{path}: "))
    return None


def _compare_with_manifest(manifest: Manifest, index: Index, report: SplitReport) -> None:
    """Numbers of the manifest that the index must confirm."""
    classes = len(manifest.classes)
    out_of_range = np.flatnonzero((index.label < 0) | (index.label >= classes))
    for i in out_of_range.tolist():
        report.add(INDEX_NAME, f"{index.name(i)!r}: label {index.label[i]} is out of range for {classes} classes")
    if np.any(index.shard >= len(manifest.shards)):
        report.add(INDEX_NAME, f"names shards beyond the {len(manifest.shards)} of the manifest")
    names = [index.name(i) for i in range(len(index))]
    if sorted(set(names)) != names:
        report.add(INDEX_NAME, "the names of the samples are not sorted and distinct")
    claims: list[tuple[str, object, object]] = [
        ("num_samples", manifest.num_samples, len(index)),
        ("num_bytes", manifest.num_bytes, int(index.length.sum(dtype=np.int64))),
        (
            "samples of the shards",
            [s.samples for s in manifest.shards],
            _count(index.shard, len(manifest.shards)),
        ),
    ]
    if not out_of_range.size:
        claims.append(("class_counts", manifest.class_counts, _count(index.label, classes)))
    if len(index):
        claims.append(("image_sizes", manifest.image_sizes, image_size_range(index.width, index.height)))
    for name, claimed, found in claims:
        if claimed != found:
            report.add(MANIFEST_NAME, f"{name}: the manifest says {claimed}, the index {found}")
    for name, count in zip(manifest.classes, manifest.class_counts, strict=False):
        if not count:
            report.add(MANIFEST_NAME, f"empty class: {name!r} has no image")


def _count(values: np.ndarray, size: int) -> list[int]:
    return np.bincount(values, minlength=size).tolist()


def _samples_by_shard(manifest: Manifest, index: Index | None) -> list[list[int]]:
    """Sample ids in every shard, in the order of their offsets."""
    rows: list[list[int]] = [[] for _ in manifest.shards]
    if index is not None:
        for i in np.lexsort((index.offset, index.shard)).tolist():
            if index.shard[i] < len(rows):
                rows[int(index.shard[i])].append(i)
    return rows


def _verify_shard(path: Path, shard: ShardInfo, report: SplitReport) -> None:
    try:
        size = path.stat().st_size
        if size != shard.size:
            how = "cut short" if size < shard.size else "too long"
            report.add(
                path,
                f"{how}: {size:,} bytes where the manifest says {shard.size:,}; restore it or pack again",
            )
        elif sha256_file(path) != shard.sha256:
            report.add(path, "its bytes have changed (SHA-256 differs from the manifest); restore it or pack again")
    except FileNotFoundError:
        report.add(path, "the shard is missing; restore it or pack again")
    except OSError as error:
        report.add(path, f"cannot be read ({error.strerror})")


def _verify_members(path: Path, keys: list[str], index: Index, rows: list[int], report: SplitReport) -> None:
    """Every sample of the index in this shard against the tar's members, and the other way round."""
    try:
        members = scan_tar(path)
    except DataError as error:
        report.add(path, str(error).removeprefix(f"{path}: "))
        return
    places = {member.offset: member for member in members if not member.name.endswith(".cls")}
    labels = {member.name.removesuffix(".cls"): member for member in members if member.name.endswith(".cls")}
    if len(places) + len(labels) != len(members):
        report.add(path, "two members of the tar have the same name")
    with path.open("rb") as file:
        for i in rows:
            where = f"{path.name}: {index.name(i)!r}"
            found = places.pop(int(index.offset[i]), None)
            if found is None or found.name.partition(".")[0] != keys[i] or found.size != index.length[i]:
                report.add(where, f"the index wants key {keys[i]} here, the tar has {_describe(found)}")
            label = labels.pop(keys[i], None)
            if label is None:
                report.add(where, f"the tar has no {keys[i]}.cls")
                continue
            file.seek(label.offset)
            text = file.read(label.size)
            if text != str(index.label[i]).encode():
                report.add(where, f"{keys[i]}.cls says {text[:20]!r}, the index label {index.label[i]}")
    for member in [*places.values(), *labels.values()]:
        report.add(path, f"member {member.name} is not in the index")


def _keys(manifest: Manifest, index: Index) -> list[str]:
    """Keys by sample id. Images skipped in packing have used up theirs."""
    names = [index.name(i) for i in range(len(index))]
    everything = sorted({*names, *(bad["name"] for bad in manifest.skipped)})
    ranks = {name: rank for rank, name in enumerate(everything)}
    return [sample_key(ranks[name], len(everything)) for name in names]


def _describe(member: TarMember | None) -> str:
    return f"{member.name} of {member.size:,} bytes" if member else "no image at that offset"


def _undecodable(
    path: Path, index: Index, rows: list[int], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[str, str]]:
    """Decode the samples `rows` of a shard; yield (where, what) for those that fail or have another size."""
    descriptor = os.open(path, os.O_RDONLY)

    def check(i: int) -> str:
        data = os.pread(descriptor, int(index.length[i]), int(index.offset[i]))
        if len(data) != index.length[i]:
            return "lies beyond the end of the shard"
        try:
            info = check_image(data)
        except DataError as error:
            return f"unreadable image ({error})"
        if (info.width, info.height) != (index.width[i], index.height[i]):
            return f"is {info.width}x{info.height}, in the index {index.width[i]}x{index.height[i]}"
        return ""

    mean = int(index.length[rows].mean()) if rows else 0
    try:
        for i, what in zip(rows, ordered_map(pool, check, rows, workers=workers, size=lambda _: mean), strict=True):
            if what:
                yield f"{path.name}: {index.name(i)!r}", what
    finally:
        os.close(descriptor)
