"""What a person sees while a run trains: a live bar on a terminal, plain lines in a log file. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from oat_dist.distributed import World

__all__ = ["Display"]


class Display:
    """Prints to stderr, so that stdout stays for answers."""

    def __init__(self, world: World) -> None:
        self.shown = world.is_main
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, markup=False)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show a bar over steps for as long as the block runs; nothing but `say` lines where stderr is no terminal."""
        if not self.shown or not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as self._bar:
            self._task = self._bar.add_task("starting", total=total, completed=done)
            try:
                yield
            finally:
                self._bar = None

    def update(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
