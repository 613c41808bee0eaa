"""`inspect`: what a set holds, in numbers and pictures."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from oat_dist.commands.arguments import positive
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.integrity.inspection import choose_samples, describe, read_images
from oat_dist.data.integrity.split_list import find_splits, split_name
from oat_dist.data.remote.fetch import shown
from oat_dist.errors import DataError, run_command
from oat_dist.files import write_atomic

__all__ = ["DESCRIPTION", "add_arguments", "main", "run"]

DESCRIPTION = """\
Say what a packed or indexed set holds: classes and how many images each has, sizes, bytes, shards.
With --output also draw it:

  <split>-classes.png   images by class: is it balanced?
  <split>-samples.png   a sheet of samples, a few of each class, drawn by --seed
"""

EXAMPLES = """\
examples:
  inspect packed/cifar10                                     numbers of all splits
  inspect packed/cifar10 --output look                       and pictures of all splits into look/
  inspect packed/cifar10 --split test --output sheet.png     only the sheet of samples of one split
  inspect indexed/mine/train --output look --samples 200 --seed 1
"""

_MOST_SAMPLES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("set", metavar="SET", help="a folder of splits, or one split; or the URL of one")
    parser.add_argument("--split", metavar="NAME", help="only this split")
    parser.add_argument(
        "--output",
        metavar="DIR|FILE.png",
        type=Path,
        help="a folder for the pictures, made if missing; or a file for the sheet of samples of one split",
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=64, help="samples on the sheet, at most (default: 64)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="draws the samples (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")


def run(args: argparse.Namespace) -> int:
    if args.samples > _MOST_SAMPLES:
        raise DataError(f"--samples {args.samples:,}: too many for a picture; give {_MOST_SAMPLES:,} or fewer")
    if args.seed < 0:
        raise DataError(f"--seed {args.seed} is below 0; give a whole number from 0 on")
    locations = _choose(args.set, args.split)
    sheets, charts = _pictures(args.output, [split_name(location) for location in locations])
    _refuse_replacing([*sheets, *charts], args.overwrite)
    for number, location in enumerate(locations):
        shards = open_split(location)
        for line in describe(shards):
            print(line)
        if charts:
            from oat_dist.data.integrity.pictures import balance_png

            title = f"{shards.manifest.split}: {shards.num_samples:,} images of {len(shards.classes):,} classes"
            _write(charts[number], balance_png(title, shards.classes, shards.manifest.class_counts))
        if sheets:
            _draw_sheet(shards, sheets[number], args.samples, args.seed)
    if args.output is None:
        print(f"pictures: oat-dist inspect {shlex.quote(args.set)} --output FOLDER")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inspect")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def _choose(location: str, split: str | None) -> list[str]:
    found = find_splits(location)
    if split is None:
        return found
    chosen = [place for place in found if split_name(place) == split]
    if not chosen:
        there = ", ".join(map(split_name, found))
        raise DataError(f"{shown(location)}: has no split {split!r}; there are {there}")
    return chosen


def _pictures(output: Path | None, names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(sheets, charts) to draw, one of each for a split, or none."""
    if output is None:
        return [], []
    if output.suffix.lower() == ".png":
        if len(names) > 1:
            raise DataError(
                f"{output}: one file for the splits {', '.join(names)}; choose one with --split, or give a folder"
            )
        return [output], []
    if output.suffix:
        raise DataError(f"{output}: pictures are written as .png; give a FILE.png or a folder")
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: a file is in the way; choose another folder")
    return [output / f"{name}-samples.png" for name in names], [output / f"{name}-classes.png" for name in names]


def _refuse_replacing(paths: Sequence[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: a folder is in the way; choose another name")
        if path.exists() and not overwrite:
            raise DataError(f"{path}: already exists; choose another name, or replace it: --overwrite")


def _draw_sheet(shards: ShardSet, path: Path, samples: int, seed: int) -> None:
    from oat_dist.data.integrity.pictures import sheet_png

    choice = choose_samples(shards, samples, seed)
    images, kinds = read_images(shards, choice.ids)
    labels = [int(label) for label in shards.index.label[choice.ids]]
    few = f" from {choice.shards} of {len(shards.manifest.shards):,} shards" if choice.shards else ""
    print(f"  formats of {len(images)} samples{few}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    shown_classes, classes = len(set(labels)), len(shards.classes)
    of = f"{classes:,}" if shown_classes == classes else f"{shown_classes:,} of the {classes:,}"
    title = f"{shards.manifest.split}: {len(images):,} samples of {of} classes{few}"
    _write(path, sheet_png(title, images, [shards.classes[label] for label in labels]))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    print(f"  {path}")


if __name__ == "__main__":
    raise SystemExit(main())
