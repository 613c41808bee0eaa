"""`pack`: turn raw images into shards."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES, PackPlan, parse_splits
from oat_dist.errors import DataError, run_command

__all__ = ["DESCRIPTION", "add_arguments", "format_bytes", "main", "run"]

DESCRIPTION = """\
Pack images into WebDataset shards: OUTPUT/<split>/*.tar, with an index and a manifest beside them.

Sources:
  imagefolder  INPUT holds train/ and val/ or test/ with one folder per class in each,
               or the class folders themselves (then one split, or several with --split)
  digits       scikit-learn's handwritten digits; INPUT is -

Image files are stored as they are, in an order drawn by --seed; the same input gives the same bytes.
Splits appear under their names only when everything is written, so a pack may be interrupted at any time.
"""

EXAMPLES = """\
examples:
  pack imagefolder cifar10 packed/cifar10              splits as the folders say
  pack imagefolder photos packed/photos --split train=0.8 --split val=0.2
  pack imagefolder photos packed/photos --dry-run      look first, write nothing
  pack digits - packed/digits                          no download needed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", choices=sorted(SOURCES), metavar="SOURCE", help=" or ".join(sorted(SOURCES)))
    parser.add_argument("input", metavar="INPUT", help="folder to read; - for digits")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the splits; made if missing")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME[=SHARE]",
        help="NAME=SHARE, repeated or with commas: deal each class's images at random, shares add up to 1; "
        "NAME: of an input with splits, pack this one; of one without, call it NAME (default: train)",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides order and dealing (default: %(default)s)")
    parser.add_argument(
        "--shard-samples",
        type=_positive,
        default=10_000,
        metavar="N",
        help="images per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=_size,
        default="256M",
        metavar="SIZE",
        help="shard size, K, M or G (default: %(default)s)",
    )
    parser.add_argument(
        "--on-bad",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable image: stop, or skip it and list it (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace packed splits, once the new ones are whole")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads (default: one per core, at most 16)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be packed, and write nothing")


def run(args: argparse.Namespace) -> int:
    plan = SOURCES[args.source](args.input, splits=parse_splits(args.split), seed=args.seed)
    _refuse_output_in_input(args.input, args.output)
    if args.dry_run:
        for line in _describe(plan):
            print(line)
        print(f"dry run: nothing was written to {args.output}")
        return 0
    packed = write_splits(
        plan.splits,
        args.output,
        classes=plan.classes,
        source=plan.source,
        seed=args.seed,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes,
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


def _describe(plan: PackPlan) -> list[str]:
    lines = [f"{len(plan.classes)} classes: {', '.join(plan.classes)}"]
    for split, samples in plan.splits.items():
        counts = dict.fromkeys(plan.classes, 0)
        for sample in samples:
            counts[str(sample.label)] += 1
        lines.append(f"{split}: {len(samples):,} images, {min(counts.values()):,} to {max(counts.values()):,} a class")
    return [*lines, *(f"note: {note}" for note in plan.notes)]


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
