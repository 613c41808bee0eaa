"""Progress on stderr: a bar on a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["show_progress"]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(title: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which counts towards `total`; it does nothing when not `enabled`."""
    if not enabled:
        yield lambda n: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda n: bar.advance(task, n)
    else:
        yield _line_printer(title, total)


def _line_printer(title: str, total: int) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(
                f"{title}: {done:,} of {total:,}, {done / (now - started):,.0f}/s",
                file=sys.stderr,
                flush=True,
            )

    return advance
