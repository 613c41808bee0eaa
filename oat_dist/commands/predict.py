"""``predict RUN INPUT...``: the class of each image, one line each."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from oat_dist.checkpoint import chosen_checkpoint
from oat_dist.commands.arguments import positive
from oat_dist.errors import OatError, run_command
from oat_dist.inference.sources import find_images, listed
from oat_dist.inference.stream import answer_images
from oat_dist.inference.writers import FORMATS, open_writer, printable
from oat_dist.portable import is_portable
from oat_dist.predict import PROTOCOLS, OATClassifier

__all__ = ["add_arguments", "load_classifier", "main", "run"]

_DESCRIPTION = """\
Classify images with a trained checkpoint, or with a model that `oat-dist export` wrote. Each image is answered by
itself (protocol stored), so the answer does not depend on what else is on the command line.

An INPUT is an image, a folder (searched in depth, in order of names), a tar of images (.tar, .tar.gz, .tar.bz2,
.tar.xz), a packed split, or - for a list of paths on stdin, one a line or separated by NUL characters.

The table has one line an image: name, class, probability, with tabs between them where it does not go to a terminal.
CSV and JSON Lines have the probabilities in full. What cannot be read is left out, listed on stderr at the end and
counted; the exit status is 0 if at least one image was answered, else 2.

examples:
  python launch/predict.py runs/quickstart photo.jpg other.png
  oat-dist predict runs/photos photos/ --top 3 --format csv --output answers.csv
  find . -name '*.jpg' -print0 | oat-dist predict runs/photos - --format jsonl
"""
_PAPERS_GROUP = 32
_MOST_LISTED = 1000  # problems that are shown one by one
_PATIENCE_S = 2.0  # a bar appears after so long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="run folder, one of its checkpoints/step-<n> folders, or an exported model",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="image, folder, tar, packed split, or -")
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or step-<n>")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, else table")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the answers there instead of to stdout")
    parser.add_argument("--top", metavar="K", type=positive, default=1, help="the K best classes of each image")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="stored",
        help="stored (default); single: each image is its own anchor set; batch: 32 images in a row share an anchor, "
        "the paper's way, where answers depend on the order of the images",
    )
    add_answer_arguments(parser)
    parser.add_argument("--batch-size", metavar="N", type=positive, default=64, help="images in one forward pass (64)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:<n>; default: the first GPU, else the CPU")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """What changes the answers of a model."""
    parser.add_argument(
        "--prior",
        metavar="PRIOR",
        help="class prior of these images, for a model trained with anchor.center=prior: training (default), balanced, "
        "class=share,class=share,... or a JSON file",
    )
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="probabilities under the temperature that `oat-dist evaluate --fit-temperature` has found",
    )


def load_classifier(arguments: argparse.Namespace, device: str | None) -> OATClassifier:
    """The model that RUN, ``--checkpoint``, ``--prior`` and ``--calibrated`` name."""
    path, prior = arguments.run, arguments.prior
    if not is_portable(path):
        checkpoint = chosen_checkpoint(path, arguments.checkpoint)
        return OATClassifier.from_checkpoint(
            checkpoint.folder, device, prior=prior or "training", calibrated=arguments.calibrated
        )
    if arguments.checkpoint is not None:
        raise OatError(f"{path}: an exported model has no checkpoints; leave --checkpoint out")
    classifier = OATClassifier.from_pretrained(path, device, prior=prior)
    if arguments.calibrated and classifier.temperature is None:
        raise OatError(f"{path}: was exported without a temperature; export the run with --calibrated")
    return classifier


def run(arguments: argparse.Namespace) -> int:
    form = arguments.format or {".csv": "csv", ".jsonl": "jsonl"}.get(_suffix(arguments.output), "table")
    classifier = load_classifier(arguments, _device(arguments.device))
    classifier.check_protocol(arguments.protocol)
    group, batch_size = None, arguments.batch_size
    if arguments.protocol == "batch":
        group, batch_size = _PAPERS_GROUP, -(-batch_size // _PAPERS_GROUP) * _PAPERS_GROUP
    problems, started = _Problems(), time.monotonic()
    count, seen = 0, set[int]()
    with _output(arguments.output) as (file, keep), _bar(arguments.output) as advance:
        on_terminal = arguments.output is None and file.isatty()
        writer = open_writer(form, file, min(arguments.top, len(classifier.classes)), aligned=on_terminal)
        for rows in answer_images(
            classifier,
            find_images(_inputs(arguments.inputs), problems.add),
            problems.add,
            protocol=arguments.protocol,
            batch_size=batch_size,
            group=group,
            top=arguments.top,
        ):
            writer.write(rows)
            count += len(rows)
            seen.update(ranking[0].label for _, ranking in rows)
            advance(len(rows))
            if on_terminal:
                file.flush()
        if count:
            keep()
    problems.show()
    if not count:
        raise OatError("none of the files is an image that can be decoded")
    seconds = time.monotonic() - started
    skipped = f"; {problems.count:,} skipped" if problems.count else ""
    print(
        f"{count:,} image{'s' * (count > 1)}, {len(seen):,} of {len(classifier.classes):,} classes, "
        f"{seconds:.2f} s, {count / seconds:,.0f} images/s{skipped}",
        file=sys.stderr,
    )
    return 0


def _inputs(inputs: Sequence[str]) -> Iterator[str]:
    return itertools.chain.from_iterable(listed(sys.stdin.buffer) if text == "-" else [text] for text in inputs)


def _suffix(path: Path | None) -> str:
    return "" if path is None else path.suffix.lower()


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        kind = torch.device(name)
        if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
            raise OatError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s) that torch can use")
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OatError(f"--device {name}: {str(error).partition(chr(10))[0]}; use cpu, cuda or cuda:<n>") from error
    return name


class _Problems:
    """What could not be read: counted, and listed up to a limit."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if len(self._first) < _MOST_LISTED:
            self._first.append(text)

    def show(self) -> None:
        for text in self._first:
            print(f"skipped: {printable(text)}", file=sys.stderr)
        if self.count > len(self._first):
            print(f"skipped: and {self.count - len(self._first):,} more", file=sys.stderr)


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[tuple[TextIO, Callable[[], None]]]:
    """Where answers go, and what must be called for a file to stay; it appears whole or not at all."""
    if path is None:
        yield sys.stdout, lambda: None
        sys.stdout.flush()
        return
    if not path.absolute().parent.is_dir():
        raise OatError(f"{path}: no such folder to write to")
    if path.is_dir():
        raise OatError(f"{path}: a folder; name a file to write to")
    path = path.resolve()  # a link keeps its place
    if path.exists() and not path.is_file():  # a device, a pipe
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file, file.flush
        return
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file, functools.partial(_keep, file, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _keep(file: TextIO, temporary: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def _bar(output: Path | None) -> Iterator[Callable[[int], None]]:
    """Progress on stderr, where that is a terminal that the answers do not go to; after some seconds."""
    if not sys.stderr.isatty() or (output is None and sys.stdout.isatty()):
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    begun = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with contextlib.ExitStack() as shown:
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task("", total=None)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            seconds = time.monotonic() - begun
            if seconds > _PATIENCE_S:
                if not bar.live.is_started:
                    shown.enter_context(bar)
                bar.update(task, description=f"{done:,} images, {done / seconds:,.0f} images/s")

        yield advance


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="predict.py")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))
