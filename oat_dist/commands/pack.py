"""`pack`: turn raw images, videos and tables into shards."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from oat_dist.data.index import ShardSet
from oat_dist.data.packing import preview_splits, write_splits
from oat_dist.data.packing.recode import Recode
from oat_dist.data.sources import PackPlan, add_source_arguments, plan_source
from oat_dist.errors import DataError, run_command

__all__ = ["DESCRIPTION", "add_arguments", "format_bytes", "main", "run"]

DESCRIPTION = """\
Pack images into WebDataset shards: OUTPUT/<split>/*.tar, with an index and a manifest beside them.

Image files are stored as they are, unless --short-side or --reencode is given, in an order drawn by --seed; the
same input gives the same bytes, with any number of workers. Splits appear under their names only when everything
is written. Interrupted, killed or out of disk space: the same command goes on after the shards that were finished.
"""

EXAMPLES = """\
examples:
  pack imagefolder photos packed/photos --dry-run          look first, write nothing
  pack imagefolder cifar10 packed/cifar10                  splits as the folders say
  pack imagefolder photos packed/photos --split train=0.8 --split val=0.2
  pack cifar10 cifar-10-python.tar.gz packed/cifar10 --hold-out val=0.1        a tenth of train, to choose by
  pack cifar10 cifar-10-python.tar.gz packed/cifar10-lt --long-tail 100        5,000 of the first class, 50 of the last
  pack imagefolder photos packed/photos --short-side 256   smaller and quicker to read
  pack imagefolder scans packed/scans --reencode jpeg:90   large PNGs as JPEGs
  pack digits - packed/digits                              no download needed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_source_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the splits; made if missing")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME[=SHARE]",
        help="NAME=SHARE, repeated or with commas: deal each class's images at random, shares add up to 1; "
        "NAME: of an input with splits, pack this one; of one without, call it NAME (default: train)",
    )
    parser.add_argument(
        "--hold-out",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="of an input with a split train: deal this share of each of its classes into a new split, such as val=0.1",
    )
    parser.add_argument(
        "--long-tail",
        type=float,
        metavar="IMBALANCE",
        help="thin train (what --hold-out leaves of it) to an exponential profile: the first class keeps as many "
        "images as the largest has, the last one IMBALANCE times fewer",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides order, dealing, thinning (default: %(default)s)")
    parser.add_argument(
        "--short-side",
        type=_positive,
        metavar="N",
        help="shrink images whose shorter side has more than N pixels to N, antialiased; others stay as they are",
    )
    parser.add_argument(
        "--reencode",
        metavar="FORMAT",
        help="write every image anew as jpeg[:QUALITY], png or webp[:QUALITY] (quality 95 if not said); "
        "default: keep the bytes, and write images that shrink in their own format",
    )
    parser.add_argument(
        "--shard-samples",
        type=_positive,
        default=10_000,
        metavar="N",
        help="images per shard, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=_size,
        default="256M",
        metavar="SIZE",
        help="shard size, at most, with K, M or G (default: %(default)s)",
    )
    parser.add_argument(
        "--on-bad",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable image: stop, or skip it and list it (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace packed splits, once the new ones are whole")
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core, at most 16)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be packed, and write nothing")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    Recode.parse(args.short_side, args.reencode)  # a wrong option is said before the input is examined
    plan = plan_source(args)
    _refuse_output_in_input(args.input, args.output)
    if args.dry_run:
        for line in _describe(plan, args):
            print(line)
        print(f"dry run: nothing was written to {args.output}")
        return 0
    packed = write_splits(
        plan.splits,
        args.output,
        classes=plan.classes,
        source=plan.sources(),
        seed=args.seed,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes,
        short_side=args.short_side,
        reencode=args.reencode,
        on_bad=args.on_bad,
        overwrite=args.overwrite,
        workers=args.workers,
        progress=True,
    )
    for shards in packed.values():
        for line in _summary(shards):
            print(line)
    for note in plan.notes:
        print(f"note: {note}")
    images, seconds = sum(map(len, packed.values())), time.monotonic() - started
    print(f"{images:,} images in {_format_seconds(seconds)}, {images / seconds:,.0f} a second")
    print(f"next: oat-dist verify {shlex.quote(str(args.output))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pack")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def format_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one such as 256M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _refuse_output_in_input(source: str, output: Path) -> None:
    if source != "-" and output.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"{output}: lies inside the input {source}; choose a folder outside of it")


def _describe(plan: PackPlan, args: argparse.Namespace) -> list[str]:
    """A table of the splits: images by class, shards and bytes."""
    splits = preview_splits(
        plan.splits, classes=plan.classes, shard_samples=args.shard_samples, shard_bytes=args.shard_bytes
    )
    at_least = "at least " if any(split.sizes_unknown for split in splits.values()) else ""
    rows = [["", *splits]]
    rows += [[name, *(f"{split.class_counts[name]:,}" for split in splits.values())] for name in plan.classes]
    rows += [
        ["all images", *(f"{sum(split.class_counts.values()):,}" for split in splits.values())],
        [f"shards, {at_least}".rstrip(", "), *(f"{split.shards:,}" for split in splits.values())],
        [f"bytes, {at_least}".rstrip(", "), *(format_bytes(split.num_bytes) for split in splits.values())],
    ]
    lines = _table(rows)
    if at_least:
        lines.append("note: images that must be read or decoded first have no size yet")
    if args.short_side or args.reencode:
        lines.append("note: shards and bytes are those of the files as they are now")
    return [f"{len(plan.classes):,} classes", *lines, *(f"note: {note}" for note in plan.notes)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _summary(shards: ShardSet) -> list[str]:
    manifest = shards.manifest
    counts = manifest.class_counts
    smallest, largest = (f"{w}x{h}" for w, h in (manifest.image_sizes["min"], manifest.image_sizes["max"]))
    lines = [
        f"{manifest.split}: {manifest.num_samples:,} images of {len(counts)} classes "
        f"({min(counts):,} to {max(counts):,} each), {format_bytes(manifest.num_bytes)} in "
        f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}, "
        + (f"all {smallest}" if smallest == largest else f"sizes {smallest} to {largest}")
    ]
    lines += [f"  skipped {bad['name']}: {bad['reason']}" for bad in manifest.skipped]
    return [*lines, f"  {shards.folder}"]


if __name__ == "__main__":
    raise SystemExit(main())
