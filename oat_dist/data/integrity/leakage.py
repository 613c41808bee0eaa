"""Images that are there twice, within a split or in two, found by 128-bit hashes of their pixels (or of their files).

Everything is arrays: 20 bytes a sample, sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Hashes", "Overlap", "between", "within"]

_EXAMPLES = 5


class Hashes(NamedTuple):
    """Of every sample of a split: its image's hash, (n, 2) uint64, zeros: not known; its file's CRC-32; its label."""

    image: np.ndarray
    crc: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Samples that are copies of another.

    Attributes:
        count: how many.
        same_file: how many of them byte for byte, and not only pixel for pixel, as the first one of their kind.
        other_label: how many have another label than that first one.
        examples: ids of copies, each after the id of what it is a copy of; the first few.
    """

    count: int
    same_file: int
    other_label: int
    examples: list[tuple[int, int]]


def within(split: Hashes) -> Overlap:
    """Copies of an earlier sample of the same split."""
    first, copy = _copies(split.image)
    return _overlap(split, split, first, copy)


def between(one: Hashes, other: Hashes) -> Overlap:
    """Samples of `other` that are copies of one of `one`; their ids are each split's own."""
    first, copy = _copies(np.concatenate([one.image, other.image]))
    leaks = (first < len(one.image)) & (copy >= len(one.image))
    return _overlap(one, other, first[leaks], copy[leaks] - len(one.image))


def _copies(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(id of the first with that hash, id of a later one) of every later one, by the later id; zeros count for none."""
    known = np.flatnonzero(hashes.any(axis=1))
    order = known[np.lexsort((hashes[known, 1], hashes[known, 0]))]  # stable: the lowest id comes first
    new = np.ones(len(order), dtype=bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    first, copy = first[~new], order[~new]
    by_id = np.argsort(copy)
    return first[by_id], copy[by_id]


def _overlap(one: Hashes, other: Hashes, first: np.ndarray, copy: np.ndarray) -> Overlap:
    return Overlap(
        count=len(copy),
        same_file=int((one.crc[first] == other.crc[copy]).sum()),
        other_label=int((one.label[first] != other.label[copy]).sum()),
        examples=list(zip(first[:_EXAMPLES].tolist(), copy[:_EXAMPLES].tolist(), strict=True)),
    )
