"""``predict RUN IMAGE...``: the class of each image, one line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oat_dist.commands.evaluate import chosen_checkpoint
from oat_dist.errors import DataError, OatError, run_command
from oat_dist.predict import OATClassifier

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Classify images with a trained checkpoint. Each image is answered by itself (protocol stored), so the answer does not
depend on what else is on the command line. Files that are not images are listed at the end and skipped.

example:
  python launch/predict.py runs/quickstart photo.jpg other.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or one of its checkpoints/step-<n> folders")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files")
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or step-<n>")


def run(arguments: argparse.Namespace) -> int:
    classifier = OATClassifier.from_checkpoint(chosen_checkpoint(arguments.run, arguments.checkpoint).folder)
    failed = []
    for path in arguments.images:
        try:
            labels, probabilities_1C = classifier.predict(path)
        except DataError as error:
            failed.append(str(error))
            continue
        print(f"{path}\t{classifier.classes[labels[0]]}\t{float(probabilities_1C[0, labels[0]]):.3f}")
    for problem in failed:
        print(f"skipped: {problem}", file=sys.stderr)
    if len(failed) == len(arguments.images):
        raise OatError("none of the files is an image that can be decoded")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="predict.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
