"""Checks packed and indexed splits from the manifest down to every image, and lists all problems instead of the first.

1. The manifest is read, and its numbers are compared with the index, whose digest it holds (`verify_index`).
2. Every shard is read once, several at a time: its size and SHA-256, its members against the index (key, place, size,
   label), every image decoded and measured (`verify_shard`). A tar unknown to a packed split is a problem too.
3. All splits must have the same classes.
4. Images that are there twice are found by hashes of files and pixels, within a split and between two: those are no
   damage, but what is tested should not have been trained on (`leakage`).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oat_dist.data.index import MANIFEST_NAME
from oat_dist.data.integrity.leakage import between, within
from oat_dist.data.integrity.split_list import find_splits
from oat_dist.data.integrity.verify_split import Leak, Problem, SplitCheck, SplitReport
from oat_dist.data.ordered_map import default_workers
from oat_dist.data.progress import show_progress
from oat_dist.data.workers import Advance, start_workers

__all__ = ["Leak", "Problem", "SplitReport", "verify_output"]


def verify_output(
    output: Path | str, *, decode: bool = True, workers: int | None = None, progress: bool = False
) -> list[SplitReport]:
    """Check all splits in the folder `output` (or under that URL), or `output` itself when it is one.

    Args:
        decode: decode every image too (the slow part); copies are then found by their pixels, else by their files.
        workers: processes (or threads); default: one per core, at most 16.

    Raises:
        DataError: there is no split to check.
    """
    splits = [SplitCheck(location) for location in find_splits(output)]
    count = workers or default_workers()
    jobs = [
        [number, shard]
        for number, split in enumerate(splits)
        if split.report.manifest
        for shard in range(len(split.report.manifest.shards))
    ]
    threads = max(1, count // max(1, len(jobs)))
    with tempfile.TemporaryDirectory(prefix="oat-verify-") as folder:

        def check(job: list[Any], advance: Advance) -> None:
            number, shard = job
            found = splits[number].check_shard(shard, decode, threads, advance)
            if found:
                (Path(folder) / f"{number}-{shard}.json").write_text(json.dumps(found))

        total = sum(split.report.manifest.num_samples for split in splits if split.report.manifest)
        title = f"verifying {', '.join(split.report.name for split in splits)}"
        with (
            start_workers(max(1, min(count, len(jobs))), {"check": check}) as pool,
            show_progress(title, total, enabled=progress) as advance,
        ):
            pool.run("check", jobs, advance)
        for number, shard in jobs:
            path = Path(folder) / f"{number}-{shard}.json"
            if path.exists():
                for where, what in json.loads(path.read_text()):
                    splits[number].report.add(where, what)
    _compare_classes([split.report for split in splits])
    _find_copies(splits)
    return [split.report for split in splits]


def _compare_classes(reports: Sequence[SplitReport]) -> None:
    known = [(report, report.manifest) for report in reports if report.manifest]
    for report, manifest in known[1:]:
        first, its_manifest = known[0]
        if manifest.classes != its_manifest.classes:
            report.add(MANIFEST_NAME, f"its classes are not those of split {first.name!r}; pack all splits together")


def _find_copies(splits: Sequence[SplitCheck]) -> None:
    known = [(split, split.index) for split in splits if split.index is not None]
    for split, index in known:
        split.report.copies = within(split.hashes)
        split.report.copy_examples = [(index.name(a), index.name(b)) for a, b in split.report.copies.examples]
    for one, other in itertools.combinations(known, 2):
        (large, large_index), (small, small_index) = (one, other) if len(one[1]) >= len(other[1]) else (other, one)
        overlap = between(large.hashes, small.hashes)
        if overlap.count:
            examples = [(large_index.name(a), small_index.name(b)) for a, b in overlap.examples]
            small.report.leaks.append(Leak(large.report.name, overlap, examples))
