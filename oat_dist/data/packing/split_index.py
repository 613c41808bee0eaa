"""Index and manifest of a split whose parts are all finished."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest, ShardInfo
from oat_dist.data.packing.parts import finished_parts, read_rows
from oat_dist.data.packing.plan import PackOptions, SplitPlan
from oat_dist.data.packing.samples import refuse_empty_class
from oat_dist.files import sha256_bytes, write_atomic

__all__ = ["image_size_range", "write_index"]


def image_size_range(widths: np.ndarray, heights: np.ndarray) -> dict[str, list[int]]:
    """`{"min": [w, h], "median": [w, h], "max": [w, h]}`, width and height each by itself."""
    sides = np.stack([widths, heights])
    return {
        "min": sides.min(axis=1).tolist(),
        "median": np.sort(sides, axis=1)[:, (sides.shape[1] - 1) // 2].tolist(),
        "max": sides.max(axis=1).tolist(),
    }


def write_index(plan: SplitPlan, folder: Path, classes: list[str], options: PackOptions) -> None:
    """Write both from the parts in `folder`; the shards are numbered in the order of the parts.

    Raises:
        DataError: a class without any readable image.
    """
    columns = {name: np.zeros(len(plan), dtype=np.int64) for name in ("shard", "offset", "length", "width", "height")}
    kept = np.zeros(len(plan), dtype=bool)
    shards: list[ShardInfo] = []
    skipped: list[dict[str, str]] = []
    covered = 0
    for tar, part in finished_parts(folder).items():
        covered += part.stop - part.start
        skipped += [{"name": plan.samples[rank].name, "reason": reason} for rank, reason in part.skipped]
        if not part.samples:
            continue
        rows = read_rows(tar)
        ranks = rows.pop("rank")
        kept[ranks] = True
        columns["shard"][ranks] = len(shards)
        for name, values in rows.items():
            columns[name][ranks] = values
        shards.append(ShardInfo(f"{plan.split}-{len(shards):06d}.tar", part.samples, part.size, part.sha256))
    assert covered == len(plan), "a part is missing"

    labels = plan.labels[kept]
    counts = np.bincount(labels, minlength=len(classes))
    refuse_empty_class(plan.split, counts, classes, "has no readable image")
    sizes: dict[str, Sequence[int] | np.ndarray] = {name: column[kept] for name, column in columns.items()}
    names = [plan.samples[rank].name for rank in np.flatnonzero(kept).tolist()]
    index = Index.from_rows({**sizes, "label": labels}, names).to_bytes()
    manifest = Manifest(
        split=plan.split,
        source=options.describe(plan.split),
        seed=options.seed,
        classes=classes,
        class_counts=counts.tolist(),
        num_samples=len(labels),
        num_bytes=int(columns["length"].sum()),
        image_sizes=image_size_range(columns["width"][kept], columns["height"][kept]),
        shards=shards,
        index={"file": INDEX_NAME, "size": len(index), "sha256": sha256_bytes(index)},
        skipped=sorted(skipped, key=operator.itemgetter("name")),
    )
    write_atomic(folder / INDEX_NAME, index)
    write_atomic(folder / MANIFEST_NAME, manifest.to_json())
