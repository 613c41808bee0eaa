"""Sides that do the same work, timed in turn: A B C A B C ..., CPU time of the process and time on the wall."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Side", "Timing", "measure", "one_core", "ratios", "spread"]

SECONDS = 0.25  # a side whose pass takes less is called several times in a row


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        run: one pass; how many samples it gave.
        close: lets go of what it holds.
        calls: passes in a row; None: as many as take `SECONDS`.
    """

    name: str
    run: Callable[[], int]
    close: Callable[[], None] = lambda: None
    calls: int | None = None


@dataclass
class Timing:
    """Microseconds a sample, repeat by repeat, and the samples of a pass."""

    samples: int
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def one_core() -> int:
    """Keep this process, and all threads it starts from here on, on one core; which one."""
    torch.set_num_threads(1)
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def measure(sides: Sequence[Side], repeats: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Timing]:
    """Time every side `repeats` times, in turn, after one pass each that warms up and fills caches."""
    found, calls = {}, {}
    for side in sides:
        say(f"warming up: {side.name}")
        found[side.name] = Timing(side.run())
        started = time.process_time()
        side.run()
        seconds = time.process_time() - started
        calls[side.name] = side.calls or max(1, min(100, round(SECONDS / max(seconds, 1e-6))))
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        for side in sides:
            timing = found[side.name]
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            count = sum(side.run() for _ in range(calls[side.name]))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            timing.cpu.append(cpu / count * 1e6)
            timing.wall.append(wall / count * 1e6)
    return found


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Repeat by repeat."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Iterable[float]) -> str:
    """Median (smallest-largest), to three digits or so."""
    values = list(values)
    return f"{_short(statistics.median(values))} ({_short(min(values))}-{_short(max(values))})"


def _short(value: float) -> str:
    digits = next(digits for digits, least in enumerate((100, 10, 1, 0)) if value >= least)
    return f"{value:,.{digits}f}"
