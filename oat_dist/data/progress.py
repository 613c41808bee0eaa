"""Progress on stderr: a bar on a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["show_progress"]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(
    title: str, total: int, *, enabled: bool, done: int = 0, vanish: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which counts towards `total`; it does nothing when not `enabled`.

    `done`: how many are there already; `vanish`: take the bar away at the end.
    """
    if not enabled:
        yield lambda n: None
    elif sys.stderr.isatty():
        # Loaded where a bar is drawn: a command that is over in a second should not wait for it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=vanish) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda n: bar.advance(task, n)
    else:
        yield _line_printer(title, total, done)


def _line_printer(title: str, total: int, before: int) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = before

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(
                f"{title}: {done:,} of {total:,}, {(done - before) / (now - started):,.0f}/s",
                file=sys.stderr,
                flush=True,
            )

    return advance
