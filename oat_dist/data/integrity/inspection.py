"""What a split holds: numbers from its index, and which samples to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from oat_dist.data.columns import low_median_high, pieces
from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.data.images.imagecheck import image_kind
from oat_dist.data.index import ShardSet
from oat_dist.data.storage import ShardReader

__all__ = ["Choice", "choose_samples", "describe", "format_counts", "read_images"]

_ALL_CLASSES = 30  # listed one by one, else the largest and the smallest
_SOME_CLASSES = 8
_WHOLE = 1 << 22  # samples up to which all are considered, beyond it a million at random
_DRAWN = 1 << 20
_REMOTE_SHARDS = 2  # fetched whole, for a picture


@dataclass(frozen=True)
class Choice:
    """Samples to show, by class; `shards` says from how many of the shards they were drawn, None: from all."""

    ids: list[int]
    shards: int | None


def describe(shards: ShardSet) -> Iterator[str]:
    """Lines of text. Goes once over the columns of the index; reads no image."""
    manifest, index = shards.manifest, shards.index
    counts, classes = manifest.class_counts, manifest.classes
    sizes = [shard.size for shard in manifest.shards]
    yield f"{manifest.split}: {len(index):,} images of {len(classes):,} classes, {shards.where}"
    rows = [("", "least", "median", "most")]
    rows.append(("images a class", *_three(f"{value:,}" for value in low_median_high(np.array(counts)))))
    if len(index):
        rows.append(("width, pixels", *_three(f"{value:,}" for value in low_median_high(index.width))))
        rows.append(("height, pixels", *_three(f"{value:,}" for value in low_median_high(index.height))))
        rows.append(("width / height", *_three(f"{value:.2f}" for value in _aspects(shards))))
        rows.append(("bytes an image", *_three(f"{value:,}" for value in low_median_high(index.length))))
    if sizes:
        rows.append(("bytes a shard", *_three(f"{value:,}" for value in low_median_high(np.array(sizes)))))
    yield from _aligned(rows)
    where = "beside the index"
    if remote := len(shards.remote_shards()):
        where = f"{remote:,} of them remote"
    elif any(shard.url is not None for shard in manifest.shards):
        where = "elsewhere on disk"
    yield f"  {len(sizes):,} shard{'s' * (len(sizes) != 1)} ({where}), {sum(sizes):,} bytes; source: {manifest.source}"
    if manifest.skipped:
        yield f"  left out when it was made: {len(manifest.skipped):,}, listed in the manifest"
    yield from format_counts(classes, counts)


def format_counts(classes: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """The classes with their counts and shares: all of them, or the largest and the smallest."""
    total = max(1, sum(counts))
    rows = [
        (f"{name}", f"{count:,}", f"{100 * count / total:.1f} %") for name, count in zip(classes, counts, strict=True)
    ]
    if len(rows) <= _ALL_CLASSES:
        yield "  classes:"
        yield from _aligned(rows, indent=4)
        return
    order = sorted(range(len(rows)), key=lambda k: (-counts[k], k))
    yield f"  largest classes, of {len(rows):,}:"
    yield from _aligned([rows[k] for k in order[:_SOME_CLASSES]], indent=4)
    yield "  smallest classes:"
    yield from _aligned([rows[k] for k in order[-_SOME_CLASSES:]], indent=4)
    if empty := sum(count == 0 for count in counts):
        yield f"  {empty:,} classes have no image"


def choose_samples(shards: ShardSet, count: int, seed: int) -> Choice:
    """At most `count` samples drawn by `seed`, equally many of each class as far as there are, sorted by class.

    Of more classes than `count` some are drawn. Of remote shards only `_REMOTE_SHARDS` are drawn from.
    """
    random = np.random.default_rng(seed)
    index = shards.index
    total = len(index)
    rows = np.arange(total) if total <= _WHOLE else np.unique(random.integers(total, size=_DRAWN))
    drawn_from = None
    if len(shards.remote_shards()) > _REMOTE_SHARDS:
        drawn_from = _REMOTE_SHARDS
        numbers = random.choice(len(shards.manifest.shards), _REMOTE_SHARDS, replace=False)
        rows = rows[np.isin(index.shard[rows], numbers)]
    rows = random.permutation(rows)
    labels = index.label[rows]
    order = np.argsort(labels, kind="stable")
    rows, labels = rows[order], labels[order]
    present, starts = np.unique(labels, return_index=True)
    if len(present) > count:
        kept = np.sort(random.choice(len(present), count, replace=False))
        present, starts = present[kept], starts[kept]
    each = max(1, count // max(1, len(present)))
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)  # within the class
    chosen = np.isin(labels, present) & (rank < each)
    return Choice(rows[chosen].tolist(), drawn_from)


def read_images(shards: ShardSet, ids: Sequence[int]) -> tuple[list[np.ndarray | None], Counter[str]]:
    """The pixels of samples, None where they cannot be decoded, and how many there are of each kind of file."""
    images: list[np.ndarray | None] = []
    kinds: Counter[str] = Counter()
    reader = ShardReader(shards)
    try:
        reader.prefetch(np.array(ids, dtype=np.int64))
        for sample_id in ids:
            data = reader.read(sample_id)
            try:
                images.append(decode_rgb(data))
                kinds[image_kind(data)] += 1
            except ImageError:
                images.append(None)
                kinds["unreadable"] += 1
    finally:
        reader.close()
    return images, kinds


def _aspects(shards: ShardSet) -> tuple[float, float, float]:
    """Width by height: least, median, greatest. Of many millions the median is that of evenly spaced ones."""
    index = shards.index
    lows, highs = [], []
    for start, stop in pieces(len(index)):
        ratio = index.width[start:stop] / np.maximum(index.height[start:stop], 1)
        lows.append(ratio.min())
        highs.append(ratio.max())
    step = -(-len(index) // _WHOLE)
    median = np.median(index.width[::step] / np.maximum(index.height[::step], 1))
    return float(min(lows)), float(median), float(max(highs))


def _three(values: Iterator[str]) -> tuple[str, str, str]:
    low, median, high = values
    return low, median, high


def _aligned(rows: Sequence[Sequence[str]], indent: int = 2) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield (" " * indent + "  ".join(cells)).rstrip()
