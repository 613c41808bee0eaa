"""`index`: an index over shards that somebody else wrote."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from oat_dist.commands.arguments import positive
from oat_dist.commands.pack import format_bytes
from oat_dist.data.foreign.labels import read_classes
from oat_dist.data.foreign.parts import count_words
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.write_index import Indexed, index_shards
from oat_dist.errors import run_command

__all__ = ["DESCRIPTION", "add_arguments", "main", "run"]

DESCRIPTION = """\
Index tars written by webdataset's ShardWriter, img2dataset or tar itself, so that oat-dist can train on
them. The tars stay where and as they are: only OUTPUT/<split>/index.safetensors and manifest.json are
written. Every shard is read once, from start to end.

SHARDS are tars, folders of *.tar, wildcards, braces ({000000..000012}), or URLs (http://, s3://, gs://,
...; with braces). A sample is what shares a key: the file name up to its first dot.

  image   the member whose extension is an image's; --image-key where a sample has several
  label   the text of .cls, or what --label says; numbers are class numbers, other texts class names,
          numbered in sorted order
"""

EXAMPLES = """\
examples:
  index shards/*.tar --output indexed/mine
  index 'shards/train-{000000..000146}.tar' --output indexed/mine --split train
  index 'shards/val-{000000..000006}.tar' --output indexed/mine --split val     (the same classes)
  index laion/ --output indexed/laion --label json:label --on-missing skip      (img2dataset)
  index photos.tar --output indexed/photos --label json:meta.species --image-key 'jpg;png'
  index 'https://host/shards/{00000..00099}.tar' --output indexed/far --classes names.txt
  verify indexed/mine
"""

_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="tars: paths, folders, wildcards, braces, URLs")
    parser.add_argument("--output", metavar="OUTPUT", type=Path, required=True, help="folder for the splits")
    parser.add_argument("--split", metavar="NAME", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument(
        "--image-key",
        metavar="EXT",
        help="extension of the image: jpg, left.png; jpg;png takes the first one there (default: any image)",
    )
    parser.add_argument(
        "--label",
        metavar="EXT[:KEY]",
        default="cls",
        help="where the label is: cls, txt, or a value in JSON by its path, json:label, json:a.b.0 (default: cls)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="class names, one a line, in the order of their numbers (default: those of a split already in OUTPUT, "
        "else what the labels say)",
    )
    parser.add_argument(
        "--first-label", metavar="N", type=int, default=0, help="labels that are numbers count from N (default: 0)"
    )
    parser.add_argument(
        "--on-missing",
        choices=("stop", "skip"),
        default="stop",
        help="at a sample without image or label, one that cannot be read, or a damaged shard: stop, or skip it and "
        "list it in the manifest (default: %(default)s)",
    )
    parser.add_argument(
        "--no-decode", dest="decode", action="store_false", help="read the images' headers only: quicker, finds less"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index; packed splits are never replaced")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core, at most 16)")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    indexed = index_shards(
        args.shards,
        args.output,
        split=args.split,
        rules=Rules.parse(args.image_key, args.label, args.first_label),
        classes=None if args.classes is None else read_classes(args.classes),
        on_missing=args.on_missing,
        decode=args.decode,
        overwrite=args.overwrite,
        workers=args.workers,
        progress=True,
    )
    for line in _summary(indexed, time.monotonic() - started):
        print(line)
    print(f"next: oat-dist verify {shlex.quote(str(args.output))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="index")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def _summary(indexed: Indexed, seconds: float) -> Iterator[str]:
    manifest = indexed.shards.manifest
    counts = manifest.class_counts
    smallest, largest = (f"{w}x{h}" for w, h in (manifest.image_sizes["min"], manifest.image_sizes["max"]))
    yield (
        f"{manifest.split}: {manifest.num_samples:,} images of {len(counts):,} classes "
        f"({min(counts):,} to {max(counts):,} each), {format_bytes(manifest.num_bytes)} in "
        f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) > 1)}, "
        + (f"all {smallest}" if smallest == largest else f"sizes {smallest} to {largest}")
    )
    if indexed.classes_from:
        yield f"  classes from {indexed.classes_from}"
    if empty := [name for name, count in zip(manifest.classes, counts, strict=True) if not count]:
        hint = " (do the labels count from 1? --first-label 1)" if empty == ["0"] else ""
        yield f"  without any image: {len(empty):,} classes, {_some(empty)}{hint}"
    if indexed.others:
        yield "  not used: " + ", ".join(
            f"{count:,} {f'.{kind}' if kind else 'without a key'}" for kind, count in _most(indexed.others)
        )
    if indexed.left_out:
        yield f"  left out: {sum(indexed.left_out.values()):,} samples, {count_words(indexed.left_out)}"
        for bad in manifest.skipped[:_SHOWN]:
            yield f"    {bad['name']}: {bad['reason']}"
        if sum(indexed.left_out.values()) > _SHOWN:
            yield f"    ... all in {indexed.shards.folder / 'manifest.json'}"
    for damaged in indexed.damaged:
        yield f"  left out: {damaged}"
    yield f"  {indexed.shards.folder}, in {seconds:.1f} s ({manifest.num_samples / max(seconds, 1e-3):,.0f} images/s)"


def _most(others: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(others.items(), key=lambda pair: -pair[1])[:_SHOWN]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


if __name__ == "__main__":
    raise SystemExit(main())
