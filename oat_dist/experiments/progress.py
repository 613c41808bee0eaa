"""What a person sees while a table is being trained: a bar on a terminal, lines in a log file. Nothing but stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from oat_dist.experiments.plan import PlannedRun
from oat_dist.experiments.run_state import epochs_done
from oat_dist.pace import clock_text, in_words

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 60.0


class _Console(Console):
    """Leaves the cursor alone: a second Ctrl-C ends us at once, with nobody to bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Progress:
    """Of `runs`, those that are not done yet."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._epochs = {run.folder: epochs_done(run) for run in runs}
        self._last = {run.folder: run.config.epochs for run in runs}
        self._left = len(runs)
        self._began, self._line_at = time.monotonic(), time.monotonic()
        self._at_start = sum(self._epochs.values())
        self._said: set[str] = set()
        self._running: list[PlannedRun] = []
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw for as long as the block runs, where stderr is a terminal."""
        if not sys.stderr.isatty() or self._console.is_dumb_terminal:
            yield
            return
        with Live(get_renderable=self._view, console=self._console, refresh_per_second=2) as self._live:
            yield
        self._live = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def once(self, text: str) -> None:
        """The same line is said once."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def began(self, run: PlannedRun) -> None:
        if self._live is None:
            self.say(f"{run.name}: training, epoch {int(epochs_done(run)) + 1}/{run.config.epochs}")

    def ended(self, run: PlannedRun, how: str) -> None:
        self._left -= 1
        if not how.startswith(("failed", "stopped")):
            self._epochs[run.folder] = run.config.epochs
        left = self._seconds_left()
        self.say(f"{run.name}: {how}; {self._left} run(s) left" + (f", about {in_words(left)}" if left else ""))

    def update(self, running: Sequence[PlannedRun]) -> None:
        """Look at what is `running` now."""
        self._running = list(running)
        now = time.monotonic()
        if self._live is None and now - self._line_at < _SECONDS_BETWEEN_LINES:
            return
        for run in running:
            self._epochs[run.folder] = epochs_done(run)
        if self._live is None and running:
            self._line_at = now
            self.say(", ".join(f"{run.name} {self._epochs[run.folder]:.0f}/{run.config.epochs}" for run in running))

    def _seconds_left(self) -> float | None:
        done = sum(self._epochs.values()) - self._at_start
        rest = sum(self._last.values()) - sum(self._epochs.values())
        return (time.monotonic() - self._began) / done * rest if done > 0 and rest > 0 else None

    def _view(self) -> Group:
        left = self._seconds_left()
        row = Grid.grid(padding=(0, 1, 0, 0), expand=True)
        for ratio in (None, 1, None, None):
            row.add_column(no_wrap=True, ratio=ratio)
        row.add_row(
            f"{self._left} run(s) left",
            ProgressBar(total=sum(self._last.values()), completed=sum(self._epochs.values())),
            clock_text(time.monotonic() - self._began),
            f"ETA {'-:--:--' if left is None else clock_text(left)}",
        )
        lines = [
            Text(f"{run.name}  epoch {self._epochs[run.folder]:.0f}/{run.config.epochs}", no_wrap=True)
            for run in self._running
        ]
        return Group(row, *lines)
