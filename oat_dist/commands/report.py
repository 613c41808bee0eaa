"""`oat-dist report RUN...`: write the report of a run, or the comparison of several, and say where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oat_dist.errors import ConfigError, run_command
from oat_dist.report import COMPARISON_NAME, write_comparison, write_report

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = f"""\
Write RUN/report.html anew, one self-contained file: accuracies by protocol, curves, confusions, mistakes, time, data,
configuration, environment. Training writes it at its end; this is for a run under way or one that was cut off.

With --against also what this run gets right and another one wrong, and whether the difference is more than chance.
Several runs are compared on one page, {COMPARISON_NAME} if no other --output is given; those that differ in nothing
but their seed are shown as one, with mean and spread.

examples:
  oat-dist report runs/quickstart
  oat-dist report runs/cifar10-oat --against runs/cifar10-ce
  oat-dist report runs/ce-* runs/oat-* --output compare.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder: the output_dir of a training")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="write the page there")
    parser.add_argument(
        "--against", type=Path, metavar="BASE", help="run folder to test the others against (of several: the first one)"
    )
    parser.add_argument("--labels", metavar="A,B,...", help="a name for each run, instead of that of its folder")
    parser.add_argument(
        "--data", metavar="PLACE", help="packed set, or its URL, if it is no longer where the configuration says"
    )


def run(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: the report is a page; give a FILE.html")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first")
    labels = None if arguments.labels is None else arguments.labels.split(",")
    if len(arguments.runs) == 1 and labels is None:
        print(write_report(arguments.runs[0], against=arguments.against, output=output, data=arguments.data))
        return 0
    page = write_comparison(
        arguments.runs,
        output if output is not None else Path(COMPARISON_NAME),
        against=arguments.against,
        labels=labels,
        data=arguments.data,
    )
    print(page)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="oat-dist report")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))
