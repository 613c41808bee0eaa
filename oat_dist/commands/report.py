"""`oat-dist report RUN`: write RUN/report.html and say where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oat_dist.errors import run_command
from oat_dist.report import write_report

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder: the output_dir of a training")


def run(arguments: argparse.Namespace) -> int:
    print(write_report(arguments.run))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="oat-dist report", description="Write a run's report.html.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
