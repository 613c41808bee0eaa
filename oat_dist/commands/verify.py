"""`verify`: check packed shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from oat_dist.commands.pack import format_bytes
from oat_dist.data.verify import SplitReport, verify_output
from oat_dist.errors import run_command

__all__ = ["DESCRIPTION", "add_arguments", "main", "run"]

DESCRIPTION = """\
Check packed shards: manifest, index, size and SHA-256 of every shard, the key, place and label of
every sample, and that every image decodes. All problems are listed. Exit status: 0 when all is well,
1 when there are problems, 2 when there is nothing to check.
"""

EXAMPLES = """\
examples:
  verify packed/cifar10              all splits
  verify packed/cifar10/train        one split
  verify packed/cifar10 --no-decode  quicker: checksums and places only
"""

_SHOWN_AT_MOST = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a folder of packed splits, or one split")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="do not decode the images")


def run(args: argparse.Namespace) -> int:
    reports = verify_output(args.output, decode=args.decode, progress=True)
    rows = [("split", "images", "classes", "shards", "size", "problems"), *map(_row, reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(name)), *numbers]))
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems[:_SHOWN_AT_MOST]:
        print(f"{problem.where}: {problem.what}")
    if len(problems) > _SHOWN_AT_MOST:
        print(f"... and {len(problems) - _SHOWN_AT_MOST:,} more problems")
    if problems:
        print(f"{args.output}: damaged")
        return 1
    print(f"{args.output}: all is well" + ("" if args.decode else " (images not decoded)"))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def _row(report: SplitReport) -> tuple[str, ...]:
    problems = str(len(report.problems))
    manifest = report.manifest
    if manifest is None:
        return (report.name, "?", "?", "?", "?", problems)
    size = format_bytes(sum(shard.size for shard in manifest.shards))
    counts = (manifest.num_samples, len(manifest.classes), len(manifest.shards))
    return (report.name, *(f"{count:,}" for count in counts), size, problems)


if __name__ == "__main__":
    raise SystemExit(main())
