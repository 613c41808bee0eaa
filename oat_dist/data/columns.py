"""Numbers about columns of an index of any length, piece by piece: a mapped column is never copied whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

__all__ = ["count_values", "low_median_high", "pieces"]

_PIECE = 1 << 22
_MOST_BINS = 1 << 22


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces that cover `count` rows."""
    return ((start, min(start + _PIECE, count)) for start in range(0, count, _PIECE))


def count_values(column: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0..size-1 is there, (size,) int64; other values are left out."""
    total = np.zeros(size, dtype=np.int64)
    for start, stop in pieces(len(column)):
        values = column[start:stop].astype(np.int64)
        total += np.bincount(values[(values >= 0) & (values < size)], minlength=size)[:size]
    return total


def low_median_high(column: np.ndarray) -> tuple[int, int, int]:
    """Least, (lower) median and greatest of whole numbers that are not negative."""
    lows, highs = zip(*((part.min(), part.max()) for part in _parts(column)), strict=True)
    low, high = int(min(lows)), int(max(highs))
    middle = (len(column) - 1) // 2
    if high < _MOST_BINS:
        return low, int(np.searchsorted(np.cumsum(count_values(column, high + 1)), middle, side="right")), high
    return low, int(np.partition(column, middle)[middle]), high


def _parts(column: np.ndarray) -> Iterator[np.ndarray]:
    return itertools.starmap(lambda start, stop: column[start:stop], pieces(len(column)))
