"""What index and manifest must confirm of each other, and which samples and keys a shard should have."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence

import numpy as np

from oat_dist.data.columns import count_values, low_median_high, pieces
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest
from oat_dist.data.packing.samples import sample_key

__all__ = ["PackedKeys", "ShardRows", "compare_with_manifest", "empty_classes"]

_SHOWN_LABELS = 1000


class ShardRows:
    """The sample ids of each shard, in the order of their offsets."""

    def __init__(self, index: Index, shards: int) -> None:
        self._index = index
        column = index.shard
        ascending = all(np.all(column[start + 1 : stop + 1] >= column[start:stop][: len(column) - start - 1])
                        for start, stop in pieces(len(column)))  # fmt: skip
        self._order = None if ascending else np.argsort(column, kind="stable")
        counts = count_values(column, shards)
        self._ends = np.cumsum(counts)

    def of(self, shard: int) -> np.ndarray:
        start, stop = int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])
        rows = np.arange(start, stop) if self._order is None else self._order[start:stop]
        return rows[np.argsort(self._index.offset[rows], kind="stable")]


class PackedKeys:
    """The keys that our packer gave: ranks among all names. Images skipped in packing have used up theirs."""

    def __init__(self, index: Index, skipped: Sequence[str]) -> None:
        self._total = len(index) + len(skipped)
        # for each skipped name, how many of those kept come before it
        self._before = np.sort(
            np.array([bisect.bisect_left(range(len(index)), name, key=index.name) for name in skipped], dtype=np.int64)
        )

    def of(self, rows: np.ndarray) -> list[str]:
        ranks = rows + np.searchsorted(self._before, rows, side="right")
        digits = len(sample_key(0, self._total))
        return [f"{rank:0{digits}d}" for rank in ranks.tolist()]


def compare_with_manifest(manifest: Manifest, index: Index, *, packed: bool) -> Iterator[tuple[str, str]]:
    """Yield (file, what is wrong) for the numbers of the manifest that the index does not confirm."""
    classes = len(manifest.classes)
    out_of_range = np.flatnonzero((index.label < 0) | (index.label >= classes))
    for i in out_of_range[:_SHOWN_LABELS].tolist():
        yield INDEX_NAME, f"{index.name(i)!r}: label {index.label[i]} is out of range for {classes} classes"
    if len(out_of_range) > _SHOWN_LABELS:
        yield INDEX_NAME, f"... and {len(out_of_range) - _SHOWN_LABELS:,} more labels are out of range"
    if np.any(index.shard >= len(manifest.shards)):
        yield INDEX_NAME, f"names shards beyond the {len(manifest.shards)} of the manifest"
    if packed and not _names_ascend(index):
        yield INDEX_NAME, "the names of the samples are not sorted and distinct"
    claims: list[tuple[str, object, object]] = [
        ("num_samples", manifest.num_samples, len(index)),
        ("num_bytes", manifest.num_bytes, int(index.length.sum(dtype=np.int64))),
        (
            "samples of the shards",
            [shard.samples for shard in manifest.shards],
            count_values(index.shard, len(manifest.shards)).tolist(),
        ),
    ]
    if not out_of_range.size:
        claims.append(("class_counts", manifest.class_counts, count_values(index.label, classes).tolist()))
    if len(index):
        sides = zip(low_median_high(index.width), low_median_high(index.height), strict=True)
        sizes = {name: list(side) for name, side in zip(("min", "median", "max"), sides, strict=True)}
        claims.append(("image_sizes", manifest.image_sizes, sizes))
    for name, claimed, found in claims:
        if claimed != found:
            yield MANIFEST_NAME, f"{name}: the manifest says {_short(claimed)}, the index {_short(found)}"


def empty_classes(manifest: Manifest) -> list[str]:
    return [name for name, count in zip(manifest.classes, manifest.class_counts, strict=False) if not count]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _names_ascend(index: Index) -> bool:
    last = b""
    for start, stop in pieces(len(index)):
        ends = index.name_ends[start:stop].tolist()
        begin = int(index.name_ends[start - 1]) if start else 0
        text = index.name_bytes[begin : ends[-1]].tobytes()
        names = [text[a - begin : b - begin] for a, b in zip([begin, *ends], ends, strict=False)]
        if (start and names[0] <= last) or not all(map(operator.lt, names, names[1:])):
            return False
        last = names[-1]
    return True
