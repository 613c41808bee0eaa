"""`verify`: check packed or indexed shards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from oat_dist.commands.arguments import positive
from oat_dist.commands.pack import format_bytes
from oat_dist.data.integrity.leakage import Overlap
from oat_dist.data.integrity.verify import SplitReport, verify_output
from oat_dist.data.remote.fetch import is_url, shown
from oat_dist.errors import run_command

__all__ = ["DESCRIPTION", "add_arguments", "main", "run"]

DESCRIPTION = """\
Check packed or indexed shards: manifest, index, size and SHA-256 of every shard, the key, place and
label of every sample, and that every image decodes. Each shard is read once. All problems are listed.

Images that are there twice are listed apart, as they are no damage: copies within a split, and leakage,
images of one split that are in another too. The same image is one with the same pixels, whatever its
file (with --no-decode: the same file).

Exit status: 0 when all is well, 1 when there are problems (with --strict also when there is leakage),
2 when there is nothing to check.
"""

EXAMPLES = """\
examples:
  verify packed/cifar10                    all splits
  verify packed/cifar10/train              one split (leakage cannot be seen then)
  verify packed/cifar10 --no-decode        quicker: checksums, places, labels and equal files
  verify packed/cifar10 --strict           for scripts: leakage is a failure too
  verify https://host/packed/cifar10       remote; every shard is read once and not kept
"""

_SHOWN_AT_MOST = 50
_EXAMPLES_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", help="a folder of splits, or one split; or the URL of one")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="do not decode the images")
    parser.add_argument("--strict", action="store_true", help="end with status 1 when there is leakage")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core, at most 16)")


def run(args: argparse.Namespace) -> int:
    output = args.output if is_url(args.output) else Path(args.output)
    name = shown(args.output)
    reports = verify_output(output, decode=args.decode, workers=args.workers, progress=True)
    for line in _table(reports):
        print(line)
    for title, lines in (
        ("notes", [f"{note.where}: {note.what}" for report in reports for note in report.notes]),
        ("copies within a split", list(_copies(reports))),
        ("leakage between splits", list(_leaks(reports))),
        ("problems", [f"{problem.where}: {problem.what}" for report in reports for problem in report.problems]),
    ):
        if lines:
            print(f"{title}:")
            for line in lines[:_SHOWN_AT_MOST]:
                print(f"  {line}")
            if len(lines) > _SHOWN_AT_MOST:
                print(f"  ... and {len(lines) - _SHOWN_AT_MOST:,} more")
    if sum(report.copies is not None for report in reports) > 1 and not any(report.leaks for report in reports):
        print("leakage between splits: none")
    unseen = "" if args.decode else " (images not decoded)"
    if any(report.problems for report in reports):
        print(f"{name}: damaged")
        return 1
    if args.strict and any(report.leaks for report in reports):
        print(f"{name}: whole, but images of one split are in another{unseen}")
        return 1
    print(f"{name}: all is well{unseen}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def _table(reports: Sequence[SplitReport]) -> Iterator[str]:
    rows = [("split", "images", "classes", "shards", "size", "copies", "problems"), *map(_row, reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(name)), *numbers])


def _row(report: SplitReport) -> tuple[str, ...]:
    problems = f"{len(report.problems):,}"
    copies = "?" if report.copies is None else f"{report.copies.count:,}"
    manifest = report.manifest
    if manifest is None:
        return (report.name, "?", "?", "?", "?", copies, problems)
    size = format_bytes(sum(shard.size for shard in manifest.shards))
    counts = (manifest.num_samples, len(manifest.classes), len(manifest.shards))
    return (report.name, *(f"{count:,}" for count in counts), size, copies, problems)


def _copies(reports: Sequence[SplitReport]) -> Iterator[str]:
    for report in reports:
        if report.copies is not None and report.copies.count:
            yield f"{report.name}: {_how_many(report.copies, 'are copies of another one')}"
            for first, copy in report.copy_examples[:_EXAMPLES_SHOWN]:
                yield f"  {copy!r} is {first!r} again"


def _leaks(reports: Sequence[SplitReport]) -> Iterator[str]:
    for report in reports:
        for leak in report.leaks:
            total = report.manifest.num_samples if report.manifest else 0
            share = f"are also in {leak.other} ({100 * leak.overlap.count / max(1, total):.3g} % of {report.name})"
            yield f"{report.name}: {_how_many(leak.overlap, share)}"
            for there, here in leak.examples[:_EXAMPLES_SHOWN]:
                yield f"  {here!r} is {there!r} of {leak.other}"


def _how_many(overlap: Overlap, what: str) -> str:
    pixels = overlap.count - overlap.same_file
    details = [
        f"{overlap.same_file:,} the same file" if overlap.same_file else "",
        f"{pixels:,} the same pixels in another file" if pixels else "",
        f"{overlap.other_label:,} under another class" if overlap.other_label else "",
    ]
    return f"{overlap.count:,} image{'s' * (overlap.count > 1)} {what}: {', '.join(filter(None, details))}"


if __name__ == "__main__":
    raise SystemExit(main())
