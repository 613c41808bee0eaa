"""`oat-dist report RUN`: write RUN/report.html and say where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oat_dist.errors import run_command
from oat_dist.report import write_report

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Write RUN/report.html anew, one self-contained file: accuracies by protocol, curves, data, configuration, environment.
Training writes it at its end; this is for a run under way or one that was cut off.

example:
  oat-dist report runs/quickstart
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder: the output_dir of a training")


def run(arguments: argparse.Namespace) -> int:
    print(write_report(arguments.run))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="oat-dist report")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
