"""A thread-pool map that keeps the order, holds few results at a time, and is cheap for small items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["default_workers", "ordered_map"]

T = TypeVar("T")
R = TypeVar("R")

_CHUNK_BYTES = 1 << 20


def default_workers() -> int:
    """Threads for decoding: the cores this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def ordered_map(
    pool: ThreadPoolExecutor,
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int,
    size: Callable[[R], int],
) -> Iterator[R]:
    """Yield `work(item)` for every item, in order, with two chunks per worker in flight.

    A chunk is as many items as make about 1 MiB by `size(result)` in bytes, 1 to 64: handing over single tiny
    images would cost more than decoding them, and 64 large ones at once would fill the memory.
    """
    pending: deque[Future[list[R]]] = deque()
    chunk, start, done, total = 8, 0, 0, 0
    while start < len(items) or pending:
        while start < len(items) and len(pending) < 2 * workers:
            part = items[start : start + chunk]
            pending.append(pool.submit(_work_all, work, part))
            start += len(part)
        results = pending.popleft().result()
        done += len(results)
        total += sum(map(size, results))
        chunk = max(1, min(64, done * _CHUNK_BYTES // (total + 1)))
        yield from results


def _work_all(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [work(item) for item in items]
