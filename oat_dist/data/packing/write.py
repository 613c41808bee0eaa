"""Writes labelled images into shards: the walk of one sample.

1. Samples are sorted by name; the rank in that order is the sample's key, zero-padded (`00000042`).
2. Their sources are examined (size, time), and the seeded random order is cut into jobs, a shard each (`plan`).
3. Workers take whole jobs: every image is read, decoded, measured, if asked for written anew, and stored in a standard
   tar as `key.jpg` (.png, ...) and `key.cls`; the tar is synced and read back (`job`). It is finished when a file
   beside it says what lies where (`parts`): an interrupted pack goes on from the finished ones.
4. Index and manifest are written (`split_index`), and the hidden folders get their names (`staging`).

The sample id is the rank among the samples written: equal to the key unless unreadable images were skipped.
The same input gives the same bytes of every file, with any number of workers: no time, no user, no path of this machine
is written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.ordered_map import default_workers
from oat_dist.data.packing.fingerprint import UNKNOWN_SIZE
from oat_dist.data.packing.job import JobRange, pack_job
from oat_dist.data.packing.parts import Part, clear_all_but, finished_parts, parts_of_job
from oat_dist.data.packing.plan import OnBad, PackOptions, SplitPlan, cut_into_jobs, examined_at_once, job_digest
from oat_dist.data.packing.recode import Recode
from oat_dist.data.packing.samples import AnySample, Sample, class_names, class_numbers, sorted_samples
from oat_dist.data.packing.split_index import image_size_range, write_index
from oat_dist.data.packing.staging import staged_folders
from oat_dist.data.packing.tarwriter import tar_size
from oat_dist.data.progress import show_progress
from oat_dist.data.workers import Advance, Rest, Workers, start_workers
from oat_dist.errors import DataError

__all__ = ["SplitPreview", "image_size_range", "preview_splits", "write_shards", "write_splits"]

_SHARD_BYTES = 256 << 20
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLES_WORTH_A_PROCESS = 64


def write_shards(
    samples: Iterable[AnySample],
    output: Path | str,
    *,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    source: str = "custom",
    seed: int = 0,
    shard_samples: int = 10_000,
    shard_bytes: int = _SHARD_BYTES,
    short_side: int | None = None,
    reencode: str | None = None,
    on_bad: OnBad = "stop",
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ShardSet:
    """Pack `samples` into the split folder `output` (`.../train`), which appears whole or not at all.

    Interrupted or out of disk space, the same call goes on after the shards that were finished. What a callable gives
    cannot be compared with what it gave then: only its code and what is bound to it can.

    Only the list of samples is held in memory: give paths or callables rather than bytes for a large set.

    Args:
        samples: `Sample`s, or plain tuples (name, label, data).
        output: folder of the split; its parent is locked against a second packer meanwhile.
        classes: class names by label. Default: the distinct text labels sorted, or "0".."max" for numbers.
        split: name of the split, the start of the shards' file names. Default: the last part of `output`.
        source: a word for the manifest, where the data came from.
        seed: decides the order of the samples in the shards.
        shard_samples: samples per shard, at most.
        shard_bytes: size of a shard in bytes, at most (a single larger image gets a shard of its own).
        short_side: shrink images whose shorter side has more pixels to this many, antialiased.
        reencode: "jpeg", "jpeg:QUALITY", "png", "webp" or "webp:QUALITY" (95 if not said): write all images anew so.
            Default: files are kept byte for byte, and those that `short_side` shrinks are written in their own format.
        on_bad: "stop" at an image that cannot be decoded, or "skip" it and list it in `manifest.skipped`.
        overwrite: replace a packed split already there, once the new one is complete.
        workers: processes (threads, where this process has others or has loaded torch, which forking would not
            survive); default: one per core, at most 16.
        progress: show progress and remarks on stderr.

    Raises:
        DataError: see its text; no split has been written then.
        OatError: another process is packing into the same parent folder.
    """
    folder = Path(output).resolve()
    options = PackOptions(source, seed, shard_samples, shard_bytes, on_bad, Recode.parse(short_side, reencode))
    splits = {folder.name: (split or folder.name, samples)}
    how = _How(overwrite, _count(workers), progress)
    return _pack(folder.parent, splits, classes, options, how)[0]


def write_splits(
    splits: Mapping[str, Iterable[Sample]],
    output: Path | str,
    *,
    classes: Sequence[str] | None = None,
    source: str | Mapping[str, str] = "custom",
    seed: int = 0,
    shard_samples: int = 10_000,
    shard_bytes: int = _SHARD_BYTES,
    short_side: int | None = None,
    reencode: str | None = None,
    on_bad: OnBad = "stop",
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, ShardSet]:
    """Pack several splits with one class list into `output/<split>`; none appears before all are written.

    Arguments and errors as for `write_shards`; `source` may be one for each split.
    """
    options = PackOptions(source, seed, shard_samples, shard_bytes, on_bad, Recode.parse(short_side, reencode))
    folders = {name: (name, samples) for name, samples in splits.items()}
    how = _How(overwrite, _count(workers), progress)
    packed = _pack(Path(output).resolve(), folders, classes, options, how)
    return dict(zip(splits, packed, strict=True))


class SplitPreview(NamedTuple):
    """What packing a split would give: images by class, shards and their bytes (at least, if `sizes_unknown`)."""

    class_counts: dict[str, int]
    shards: int
    num_bytes: int
    sizes_unknown: int


def preview_splits(
    splits: Mapping[str, Iterable[Sample]],
    *,
    classes: Sequence[str] | None = None,
    shard_samples: int = 10_000,
    shard_bytes: int = _SHARD_BYTES,
) -> dict[str, SplitPreview]:
    """What `write_splits` would write if it kept all images as they are; reads the sizes of files and nothing else.

    Raises:
        DataError: samples that `write_splits` would refuse before it reads them.
    """
    options = PackOptions("", 0, shard_samples, shard_bytes, "stop", None)
    plans, names = _plan({name: (name, samples) for name, samples in splits.items()}, classes, options)
    previews = {}
    for plan in plans:
        plan.examine(0, len(plan))
        plan.settle_order()
        jobs = cut_into_jobs(plan, options)
        counts = np.bincount(plan.labels, minlength=len(names)).tolist()
        previews[plan.split] = SplitPreview(
            class_counts=dict(zip(names, counts, strict=True)),
            shards=len(jobs),
            num_bytes=sum(tar_size(job.content) for job in jobs),
            sizes_unknown=int(np.count_nonzero(plan.sizes == UNKNOWN_SIZE)),
        )
    return previews


@dataclass(frozen=True)
class _How:
    """What does not touch the result."""

    overwrite: bool
    workers: int
    progress: bool

    def say(self, text: str) -> None:
        if self.progress:
            print(f"note: {text}", file=sys.stderr, flush=True)


def _count(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    return workers or default_workers()


def _pack(
    parent: Path,
    splits: Mapping[str, tuple[str, Iterable[AnySample]]],
    classes: Sequence[str] | None,
    options: PackOptions,
    how: _How,
) -> list[ShardSet]:
    """Pack each `folder name -> (split name, samples)` into `parent`."""
    plans, names = _plan(splits, classes, options)
    with staged_folders(parent, list(splits), overwrite=how.overwrite, say=how.say) as folders:
        _write_parts(plans, folders, options, how)
        for plan, folder in zip(plans, folders, strict=True):
            write_index(plan, folder, names, options)
    return [open_split(parent / name) for name in splits]


def _plan(
    splits: Mapping[str, tuple[str, Iterable[AnySample]]], classes: Sequence[str] | None, options: PackOptions
) -> tuple[list[SplitPlan], list[str]]:
    """The plans, and the names of the classes."""
    for split, _ in splits.values():
        if not _SPLIT_NAME.fullmatch(split):
            raise DataError(f"split name {split!r}: use letters, digits, '.', '_' and '-' only (it names the shards)")
    samples = {split: sorted_samples(split, given) for split, given in splits.values()}
    names = class_names(classes, list(samples.values()))
    return [
        SplitPlan(split, part, class_numbers(split, part, names), options.seed) for split, part in samples.items()
    ], names


def _write_parts(plans: list[SplitPlan], folders: list[Path], options: PackOptions, how: _How) -> None:
    """Finish every part of every split, but those that an earlier attempt has finished."""

    def examine_range(work: list[Any], advance: Advance) -> None:
        split, start, stop = work
        plans[split].examine(start, stop)
        advance(stop - start)

    def pack_range(work: list[Any], advance: Advance) -> Rest:
        split, threads, *job = work
        return pack_job(plans[split], folders[split], options, JobRange(*job), threads, advance)

    total = sum(map(len, plans))
    count = max(1, min(how.workers, total // _SAMPLES_WORTH_A_PROCESS))
    with start_workers(count, {"examine": examine_range, "pack": pack_range}) as workers:
        _examine_all(plans, workers, total, how)
        jobs = [
            (split, job)
            for split, (plan, folder) in enumerate(zip(plans, folders, strict=True))
            for job in _jobs_left(plan, folder, options, how)
        ]
        threads = -(-how.workers // max(1, len(jobs)))
        left = sum(job.stop - job.start for _, job in jobs)
        title = f"packing {', '.join(plan.split for plan in plans)}"
        with show_progress(title, total, enabled=how.progress, done=total - left) as advance:
            workers.run("pack", [[split, threads, *job] for split, job in jobs], advance)


def _examine_all(plans: list[SplitPlan], workers: Workers, total: int, how: _How) -> None:
    ranges = [[split, *part] for split, plan in enumerate(plans) for part in examined_at_once(len(plan))]
    with show_progress("looking at files", total, enabled=how.progress, vanish=True) as advance:
        workers.run("examine", ranges, advance)
    for plan in plans:
        plan.settle_order()


def _jobs_left(plan: SplitPlan, folder: Path, options: PackOptions, how: _How) -> list[JobRange]:
    """The jobs of a split without what has been finished, which is kept if it is what would be packed now."""
    finished = finished_parts(folder)
    kept: dict[Path, Part] = {}
    left = []
    for number, job in enumerate(cut_into_jobs(plan, options)):
        digest = job_digest(plan, job, options)
        parts = parts_of_job(folder, number, job.start, digest, allow_skipped=options.on_bad == "skip")
        kept |= parts
        start = max([job.start, *(part.stop for part in parts.values())])
        if start < job.stop:
            left.append(JobRange(number, start, job.stop, len(parts), digest))
    clear_all_but(folder, kept)
    if kept:
        images = sum(part.stop - part.start for part in kept.values())
        how.say(f"{plan.split}: going on after {len(kept):,} finished shard(s), {images:,} of {len(plan):,} images")
    if dropped := len(finished) - len(kept):
        what = f"{dropped:,} shard(s) of an earlier attempt"
        how.say(f"{plan.split}: {what} do not fit the present files and options: dropped, packed anew")
    return left
