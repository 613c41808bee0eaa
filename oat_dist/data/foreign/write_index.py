"""An index over tars that somebody else wrote (webdataset's ShardWriter, img2dataset), which stay as they are.

1. The shards are listed (`shard_list`): in the order given, by name within a folder or wildcard.
2. Each is read once, several at a time: its SHA-256, and of every sample the image's place and size and the label
   (`tarsamples`). What was found waits in a hidden folder, not in memory (`parts`).
3. The labels of all shards become class numbers (`labels`).
4. Index and manifest are written as for a packed split; the manifest says where each shard lies.

The sample id is the place in that order, its name `<shard>/<key>`. The same shards give the same index, with any
number of workers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oat_dist.data.foreign.labels import number_labels
from oat_dist.data.foreign.parts import (
    SKIPPED_LISTED,
    OnMissing,
    PartFacts,
    count_words,
    label_hint,
    read_part,
    scan_part,
)
from oat_dist.data.foreign.place import NOT_OURS_NAME, check_free, classes_there, url_for, work_folder
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.shard_list import Shard, find_shards
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest, ShardInfo, ShardSet, open_split
from oat_dist.data.ordered_map import default_workers
from oat_dist.data.packing.split_index import image_size_range
from oat_dist.data.progress import show_progress
from oat_dist.data.remote.fetch import is_url, shown
from oat_dist.data.tars.examine import decoded, from_header
from oat_dist.data.workers import Advance, start_workers
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes, write_atomic

__all__ = ["Indexed", "index_shards"]

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SOURCE = "index"
_MIB = 1 << 20


@dataclass(frozen=True)
class Indexed:
    """The split as it can be opened now, and what was met on the way.

    Attributes:
        left_out: kind of fault -> how many samples are left out for it.
        damaged: shards left out, each with the reason.
        others: kind of member -> how many are of no use to us.
        classes_from: where the class names are from; None: from the labels.
    """

    shards: ShardSet
    left_out: dict[str, int]
    damaged: list[str]
    others: dict[str, int]
    classes_from: str | None


def index_shards(
    shards: Sequence[str | os.PathLike[str]],
    output: Path | str,
    *,
    split: str = "train",
    rules: Rules | None = None,
    classes: Sequence[str] | None = None,
    on_missing: OnMissing = "stop",
    decode: bool = True,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Indexed:
    """Write `output/<split>/` with an index and a manifest over tars that stay where and as they are.

    Args:
        shards: paths, folders, wildcards, patterns with braces, or URLs.
        rules: which member is the image, and where the label is. Default: any image, and its class in `.cls`.
        classes: class names by number. Default: those of a split that is in `output` already, else what the labels say.
        on_missing: at a sample without image or label, or with one that cannot be read, or at a damaged shard: "stop",
            or "skip" it and list it in the manifest.
        decode: decode every image; otherwise only its header is read.
        overwrite: replace an index made by this function.
        workers: processes (or threads); default: one per core, at most 16.
        progress: show progress on stderr.

    Raises:
        DataError: see its text; nothing has been written then.
        OatError: another process is writing into `output`.
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise DataError(f"split name {split!r}: use letters, digits, '.', '_' and '-' only")
    rules = rules or Rules()
    listed = find_shards(shards)
    output = Path(output).resolve()
    folder = output / split
    with work_folder(output, split) as work:
        check_free(folder, overwrite)
        classes, whose = (classes, "--classes") if classes is not None else classes_there(output, split)
        facts = _scan_all(listed, work, rules, on_missing, decode, workers or default_workers(), split, progress)
        index, manifest = _assemble(listed, facts, work, folder, split, rules, classes, whose)
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)  # never one that does not fit the index beside it
        if any(Path(shard.location).parent == folder for shard in listed):
            write_atomic(
                folder / NOT_OURS_NAME, "The tars here were indexed, not packed: oat-dist never removes them.\n"
            )
        write_atomic(folder / INDEX_NAME, index)
        write_atomic(folder / MANIFEST_NAME, manifest.to_json())
    return Indexed(
        shards=open_split(folder),
        left_out=_sum_counts(part.bad for part in facts if not part.damage),
        damaged=_damaged(listed, facts),
        others=_sum_counts(part.others for part in facts),
        classes_from=None if classes is None else whose,
    )


def _scan_all(
    listed: list[Shard],
    work: Path,
    rules: Rules,
    on_missing: OnMissing,
    decode: bool,
    workers: int,
    split: str,
    progress: bool,
) -> list[PartFacts]:
    """Read every shard; what it holds is left in `work`."""
    examine = decoded if decode else from_header
    local = not any(is_url(shard.location) for shard in listed)
    threads = max(1, workers // len(listed))

    stops = work / "stops"
    stops.mkdir()

    def scan(job: list[Any], advance: Advance) -> None:
        number = job[0]
        # Jobs begin in order, so all before the first that fails are done: what stops us depends on no timing.
        if any(int(stop.name) < number for stop in stops.iterdir()):
            return
        shard, path, counter = listed[number], _part_path(work, number), _Mebibytes(advance)
        count = counter.count if local else lambda n: None
        try:
            scan_part(path, number, shard, rules, examine, on_missing, threads, count)
        except DataError as error:
            (stops / str(number)).write_text(str(error))
        if not local:
            advance(1)

    title, total = f"indexing {split}, shards", len(listed)
    if local:
        title, total = f"indexing {split}, MiB", sum(Path(shard.location).stat().st_size for shard in listed) // _MIB
    with (
        start_workers(min(workers, len(listed)), {"scan": scan}) as pool,
        show_progress(title, total, enabled=progress) as advance,
    ):
        pool.run("scan", [[number] for number in range(len(listed))], advance)
    if failed := sorted(stops.iterdir(), key=lambda stop: int(stop.name)):
        raise DataError(failed[0].read_text())
    return [read_part(_part_path(work, number))[0] for number in range(len(listed))]


class _Mebibytes:
    """Turns counts of bytes into counts of MiB."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._rest = advance, 0

    def count(self, size: int) -> None:
        whole, self._rest = divmod(self._rest + size, _MIB)
        if whole:
            self._advance(whole)


def _part_path(work: Path, number: int) -> Path:
    return work / f"{number:09d}.rows"


def _assemble(
    listed: list[Shard],
    facts: list[PartFacts],
    work: Path,
    folder: Path,
    split: str,
    rules: Rules,
    classes: Sequence[str] | None,
    whose: str,
) -> tuple[bytes, Manifest]:
    """The bytes of the index, and the manifest, over the shards that are not damaged."""
    kept = [part for part in facts if not part.damage]
    samples = sum(part.samples for part in kept)
    if not samples:
        raise DataError(_nothing(listed, facts, rules))
    texts = list(dict.fromkeys(text for part in kept for text in part.labels))
    names, numbers = number_labels(texts, samples, classes, rules.first_label, whose)
    number_of = dict(zip(texts, numbers.tolist(), strict=True))
    columns: dict[str, list[np.ndarray]] = {}
    name_bytes = 0
    for shard, part in enumerate(kept):
        rows = read_part(_part_path(work, part.number))[1]
        codes = np.array([number_of[text] for text in part.labels], dtype=np.int32)
        rows["label"] = codes[rows["label"]]
        rows["shard"] = np.full(part.samples, shard, dtype=np.uint32)
        rows["name_ends"] = rows["name_ends"] + np.uint64(name_bytes)
        name_bytes += len(rows["name_bytes"])
        for name, values in rows.items():
            columns.setdefault(name, []).append(values)
    index = Index(**{name: np.concatenate(parts) for name, parts in columns.items()})
    del columns
    data = index.to_bytes()
    manifest = Manifest(
        split=split,
        source=_SOURCE,
        seed=0,
        classes=names,
        class_counts=np.bincount(index.label, minlength=len(names)).tolist(),
        num_samples=samples,
        num_bytes=int(index.length.sum(dtype=np.int64)),
        image_sizes=image_size_range(index.width, index.height),
        shards=[
            ShardInfo(listed[p.number].name, p.samples, p.size, p.sha256, url_for(listed[p.number].location, folder))
            for p in kept
        ],
        index={
            "file": INDEX_NAME,
            "size": len(data),
            "sha256": sha256_bytes(data),
            "rules": asdict(rules),
            "left_out": _sum_counts(part.bad for part in kept),
        },
        skipped=_skipped(listed, facts),
    )
    return data, manifest


def _nothing(listed: list[Shard], facts: list[PartFacts], rules: Rules) -> str:
    if damaged := _damaged(listed, facts):
        return f"no sample can be used: {len(damaged):,} of {len(listed):,} shards are damaged; {damaged[0]}"
    bad = _sum_counts(part.bad for part in facts)
    if not bad:
        return (
            f"{shown(listed[0].location)}: holds no samples (members such as 000000.jpg, 000000.cls); check the shards"
        )
    hint = next((text for part in facts if (text := label_hint(part, rules))), "check the shards")
    return f"no sample of {len(listed):,} shard(s) can be used: {count_words(bad)}; {hint}"


def _damaged(listed: list[Shard], facts: list[PartFacts]) -> list[str]:
    return [f"{shown(listed[part.number].location)}: {part.damage}" for part in facts if part.damage]


def _skipped(listed: list[Shard], facts: list[PartFacts]) -> list[dict[str, str]]:
    skipped = []
    for part in facts:
        if part.damage:
            skipped.append({"name": listed[part.number].name, "reason": f"the whole shard: {part.damage}"})
        else:
            skipped += [{"name": name, "reason": reason} for name, reason in part.listed]
    return skipped[:SKIPPED_LISTED]


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))
