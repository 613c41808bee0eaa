"""How long the rest of a run takes, judged by what this start of it has measured; and durations in words."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Pace", "clock_text", "evaluations_left", "in_words"]


def evaluations_left(step: int, total: int, steps_per_epoch: int, every_epochs: int) -> int:
    """Evaluations after `step` up to and with `total`: at whole multiples of `every_epochs`, and at the end."""
    if step >= total:
        return 0
    if every_epochs == 0:
        return 1
    stride = every_epochs * steps_per_epoch
    return total // stride - step // stride + (total % stride > 0)


class Pace:
    """Steps, evaluations and saves each have a price; the rest of the run is so many of them.

    Steps that were taken before this start count for nothing: nobody knows on which machine.

    Args:
        total: steps of the whole run.
        evaluations_after: how many evaluations come after a step.
        clock: seconds; for tests.

    Attributes:
        first: the step from which this start goes on.
    """

    def __init__(
        self, total: int, evaluations_after: Callable[[int], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.first, self.total = 0, total
        self._evaluations_after = evaluations_after
        self._clock = clock
        self._began = clock()
        self._intervals: deque[tuple[int, float]] = deque(maxlen=10)  # recent ones: OAT steps cost more than others
        self._evaluations: deque[float] = deque(maxlen=3)
        self._saving = 0.0
        self._evaluating_since: float | None = None

    def begin(self, step: int) -> None:
        """Steps are taken from now on, and from `step` on."""
        self.first, self._began = step, self._clock()

    def elapsed(self) -> float:
        """Seconds since this start began to train."""
        return self._clock() - self._began

    def trained(self, steps: int, seconds: float) -> None:
        """`steps` steps took `seconds`, without evaluations and saves."""
        self._intervals.append((steps, seconds))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The block is one evaluation."""
        self._evaluating_since = since = self._clock()
        try:
            yield
        finally:
            self._evaluations.append(self._clock() - since)
            self._evaluating_since = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The block is a save, or anything else that happens now and then."""
        before = self._clock()
        try:
            yield
        finally:
            self._saving += self._clock() - before

    def seconds_left(self, step: int) -> float | None:
        """From `step` to the end; None while there is nothing to judge by. Evaluations count once one was measured."""
        # Copies: the view asks from a thread of its own while the training adds to them.
        intervals, evaluations, since = tuple(self._intervals), tuple(self._evaluations), self._evaluating_since
        if step >= self.total and since is None:
            return 0.0
        done = step - self.first
        if done <= 0:
            return None
        steps = sum(count for count, _ in intervals)
        # Before the first interval ends: what the clock says, less what were no steps.
        others = self._saving + sum(evaluations)
        seconds = sum(s for _, s in intervals) if steps else max(self.elapsed() - others, 0.0)
        left = (self.total - step) * (seconds / (steps or done) + self._saving / done)
        if evaluations:
            price = sum(evaluations) / len(evaluations)
            left += price * self._evaluations_after(step)
            if since is not None:
                left += max(price - (self._clock() - since), 0.0)
        return left


def clock_text(seconds: float) -> str:
    """``0:02:13``, ``2d 03:04:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def in_words(seconds: float) -> str:
    """``34 s``, ``12 min 5 s``, ``3 h 20 min``, ``2 d 4 h``: the two largest units."""
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"
