"""What a person sees while a run trains: a live view on a terminal, plain lines in a log file. Rank 0 only.

The view is drawn by a thread of its own, four times a second, from numbers that the training leaves here: a step costs
it one assignment. On a terminal it has two lines::

    epoch 11/20 oat ━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━ 16,250/31,260 0:09:41 ETA 0:10:30
    loss 5.814  1,677 samples/s  data wait 8%  0.61 GB  batch 56.84% (best 57.40%)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from oat_dist.distributed import World
from oat_dist.pace import Pace, clock_text

__all__ = ["Display"]


class _Console(Console):
    """Leaves the cursor alone: a run may end at once (a second Ctrl-C, a watchdog), with nobody to bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Display:
    """Prints to stderr, so that stdout stays for answers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.shown = world.is_main
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = False  # whether the view is being drawn
        self._step = 0
        self._numbers = self._accuracy = self._doing = ""

    def say(self, text: str) -> None:
        """One line, on rank 0."""
        if self.shown:
            self.console.print(text, markup=False)

    def say_here(self, text: str) -> None:
        """One line on whichever rank this is: what concerns it alone."""
        self.console.print(text if self.shown else f"[rank {self.world.rank}] {text}", markup=False)

    @contextmanager
    def progress(self, pace: Pace, title: Callable[[int], str]) -> Iterator[None]:
        """Draw the view for as long as the block runs; nothing but `say` lines where stderr is no terminal.

        Args:
            pace: of the training.
            title: epoch and phase of the step after so many.
        """
        self._step = pace.first
        if not self.shown or not sys.stderr.isatty() or self.console.is_dumb_terminal:
            yield
            return
        self.live = True
        with Live(get_renderable=lambda: self._view(pace, title), console=self.console, refresh_per_second=4) as live:
            live.refresh()
            try:
                yield
            finally:
                self.live = False
                self._doing = ""

    def step(self, number: int) -> None:
        """`number` steps are done. Called after each of them."""
        self._step = number
        self._doing = ""

    def numbers(self, numbers: str) -> None:
        """What the last line of the log said."""
        self._numbers = numbers

    def doing(self, what: str) -> None:
        """Something else than a step is under way, until the next `step`."""
        self._doing = what

    def evaluating(self, done: int, total: int) -> None:
        """An evaluation under way has forwarded `done` of `total` samples."""
        self._doing = f"evaluating {done:,}/{total:,}"

    def evaluated(self, protocol: str, last: float | None, best: float | None) -> None:
        """Accuracies (0..1) of the last evaluation and of the best one; None: there was none yet."""
        if best is None:
            self._accuracy = ""
        elif last is None:
            self._accuracy = f"best {protocol} {best:.2%}"
        else:
            self._accuracy = f"{protocol} {last:.2%} (best {best:.2%})"

    def _view(self, pace: Pace, title: Callable[[int], str]) -> Group:
        step, doing = self._step, self._doing
        left = pace.seconds_left(step)
        row = Table.grid(padding=(0, 1, 0, 0), expand=True)
        for _ in range(2):
            row.add_column(no_wrap=True)
        row.columns[1].ratio = 1
        for _ in range(3):
            row.add_column(no_wrap=True)
        row.add_row(
            title(max(step - 1, 0) if doing else step),  # an evaluation and a save belong to the steps before
            ProgressBar(total=pace.total, completed=step),
            f"{step:,}/{pace.total:,}",
            clock_text(pace.elapsed()),
            f"ETA {'-:--:--' if left is None else clock_text(left)}",
        )
        parts = (doing, self._numbers, self._accuracy)
        return Group(row, Text("  ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis"))
