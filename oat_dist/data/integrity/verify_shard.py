"""Compares one shard, read once, with the rows of the index: key, place, size, label and image of every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from oat_dist.data.foreign.labels import class_numbers_of
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.index import Index, ShardInfo
from oat_dist.data.tars.image_lots import Fault
from oat_dist.data.tars.tarsamples import ShardScan

__all__ = ["Expected", "compare_file", "compare_samples"]


@dataclass(frozen=True)
class Expected:
    """What a shard should hold.

    Attributes:
        rows: ids of its samples, in the order of their offsets.
        keys: what the samples are called, in the order of `rows`.
        packed: whether all that is in the tar must be in the index; what others wrote may hold unusable samples.
        sized: whether widths and heights were measured, and are to be compared.
    """

    index: Index
    rows: np.ndarray
    keys: Sequence[str]
    classes: Sequence[str]
    rules: Rules
    packed: bool
    sized: bool


def compare_file(scan: ShardScan, shard: ShardInfo, samples: int, again: str) -> Iterator[str]:
    """What is wrong with the tar as a whole; `samples` should be in it, `again` is the remedy."""
    unread = samples - len(scan.keys)
    rest = f"; {unread:,} samples were not checked" if scan.damage and unread > 0 else ""
    if scan.size < shard.size:
        yield f"cut short: {scan.size:,} bytes where the manifest says {shard.size:,}; restore it or {again}{rest}"
        return
    if scan.size > shard.size:
        yield f"too long: {scan.size:,} bytes where the manifest says {shard.size:,}; restore it or {again}"
    elif shard.sha256 and scan.sha256 != shard.sha256:
        yield f"its bytes have changed (SHA-256 differs from the manifest); restore it or {again}"
    if scan.damage:
        yield f"{scan.damage}{rest}"


def compare_samples(
    scan: ShardScan, names: Sequence[str], expected: Expected
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Where each row is in the scan, and what is wrong.

    Args:
        names: what the samples of the scan are called.

    Returns:
        (positions, problems): (rows,) int64 with -1 for not found, and pairs of a sample id (-1: none) and a text.
    """
    index, rows = expected.index, expected.rows
    images = np.flatnonzero(scan.offset)
    place = np.searchsorted(scan.offset[images], index.offset[rows])
    at = np.append(images, -1)[place]  # beyond the last one: -1, as all that is appended below
    numbers = np.append(class_numbers_of(scan.labels, expected.classes, expected.rules.first_label), -1)
    faults: dict[int, list[Fault]] = {}
    for fault in scan.faults:
        faults.setdefault(fault.position, []).append(fault)

    def differs(there: np.ndarray, column: np.ndarray) -> np.ndarray:
        return np.append(there, there.dtype.type(0))[at] != column[rows]

    suspect = (at < 0) | differs(scan.offset, index.offset) | differs(scan.length, index.length)
    suspect |= np.append(numbers[scan.label], -1)[at] != index.label[rows]
    if expected.sized:
        suspect |= differs(scan.width, index.width) | differs(scan.height, index.height)
    there = [*names, ""]
    suspect |= np.array([there[p] != key for p, key in zip(at.tolist(), expected.keys, strict=True)], dtype=bool)
    if faults:
        suspect |= np.isin(at, list(faults))

    found, problems = at.copy(), []
    for k in np.flatnonzero(suspect).tolist():
        p = int(at[k])
        misplaced = _misplaced(scan, there[p], expected, k, p)
        if misplaced is not None:
            found[k] = -1
        texts = _wrong(scan, expected, k, p, faults.get(p, []), numbers) if misplaced is None else misplaced
        problems += [(int(rows[k]), text) for text in texts]
    unlisted = np.ones(len(names) + 1, dtype=bool)
    unlisted[found] = False
    for p in np.flatnonzero(unlisted[:-1]).tolist():
        if expected.packed or p not in faults:
            reason = f": {faults[p][0].text}" if p in faults else ""
            problems.append((-1, f"sample {names[p]} of the tar is not in the index{reason}"))
    return found, problems


def _misplaced(scan: ShardScan, there: str, expected: Expected, k: int, p: int) -> list[str] | None:
    """What is wrong if the sample is not where the index says; None if it is there."""
    row = int(expected.rows[k])
    offset, length = int(expected.index.offset[row]), int(expected.index.length[row])
    if offset + length > scan.size:
        return ["lies beyond the end of the shard"]
    if p < 0 or scan.offset[p] != offset:
        # behind a damaged place nothing was read: that is said once, of the tar
        return (
            [] if scan.damage else [f"the index wants key {expected.keys[k]} here, the tar has no image at that offset"]
        )
    if there != expected.keys[k] or scan.length[p] != length:
        return [f"the index wants key {expected.keys[k]} here, the tar has {there} of {int(scan.length[p]):,} bytes"]
    return None


def _wrong(
    scan: ShardScan, expected: Expected, k: int, p: int, faults: Sequence[Fault], numbers: np.ndarray
) -> Iterator[str]:
    """What is wrong with a sample that is where it should be."""
    index, row = expected.index, int(expected.rows[k])
    for fault in faults:
        yield fault.text
    code = int(scan.label[p])
    if code >= 0 and numbers[code] != index.label[row]:
        named = f"{expected.keys[k]}.{expected.rules.label}"
        yield f"{named} says {scan.labels[code]!r}, the index label {int(index.label[row])}"
    size, listed = (int(scan.width[p]), int(scan.height[p])), (int(index.width[row]), int(index.height[row]))
    if expected.sized and size != listed and not any(fault.kind == "unreadable image" for fault in faults):
        yield f"is {size[0]}x{size[1]}, in the index {listed[0]}x{listed[1]}"
