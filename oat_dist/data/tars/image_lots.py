"""Examines the images of a shard in small lots, in this thread or in a few others, with little waiting in memory.

Images are told apart by 128 bits of a SHA-256: of their pixels where they are decoded, else of their files.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from oat_dist.data.images.decode import ImageError

__all__ = ["Examine", "Examined", "Examiner", "Fault"]

# bytes of an image -> (width, height, SHA-256 of its pixels or none); raises ImageError
Examine = Callable[[bytes], tuple[int, int, bytes]]

_LOT_IMAGES, _LOT_BYTES = 64, 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)


class Fault(NamedTuple):
    """Why the sample at `position` cannot be used."""

    position: int
    kind: str  # "no image", "no label", "unreadable label" or "unreadable image"
    text: str


class Examined(NamedTuple):
    """Of every sample its size in pixels, hash (n, 2) uint64, and CRC-32 of its file; zeros where there is no image."""

    width: np.ndarray
    height: np.ndarray
    hash: np.ndarray
    crc: np.ndarray
    faults: list[Fault]


class _Lot(NamedTuple):
    positions: list[int]
    sizes: list[tuple[int, int]]
    hashes: list[bytes]
    crcs: list[int]
    faults: list[Fault]


class Examiner:
    """Takes images one by one; `close` it in any case.

    Args:
        examine: says what an image is.
        threads: how many call it.
        advance: told how many images are done.
    """

    def __init__(self, examine: Examine, threads: int, advance: Callable[[int], None]) -> None:
        self._examine, self._threads, self._advance = examine, threads, advance
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._waiting: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._pending: deque[Future[_Lot]] = deque()
        self._done: list[_Lot] = []

    def add(self, position: int, data: bytes) -> None:
        self._waiting.append((position, data))
        self._bytes += len(data)
        if len(self._waiting) == _LOT_IMAGES or self._bytes >= _LOT_BYTES:
            self._submit()

    def _submit(self) -> None:
        lot, self._waiting, self._bytes = self._waiting, [], 0
        if self._pool is None:
            self._take(_examined(lot, self._examine))
            return
        self._pending.append(self._pool.submit(_examined, lot, self._examine))
        while len(self._pending) > 2 * self._threads:
            self._take(self._pending.popleft().result())

    def _take(self, lot: _Lot) -> None:
        self._done.append(lot)
        self._advance(len(lot.positions))

    def finish(self, count: int) -> Examined:
        """What was found of `count` samples."""
        self._submit()
        while self._pending:
            self._take(self._pending.popleft().result())
        width, height, crc = (np.zeros(count, np.uint32) for _ in range(3))
        found = Examined(width, height, np.zeros((count, 2), np.uint64), crc, [])
        for lot in self._done:
            if lot.positions:
                sizes = np.array(lot.sizes, dtype=np.uint32)
                found.width[lot.positions], found.height[lot.positions] = sizes[:, 0], sizes[:, 1]
                found.hash[lot.positions] = np.frombuffer(b"".join(lot.hashes), dtype=np.uint64).reshape(-1, 2)
                found.crc[lot.positions] = lot.crcs
            found.faults.extend(lot.faults)
        found.hash[:, 0] ^= found.width * _ODD  # 2x8 pixels may have the bytes of 4x4
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _examined(lot: list[tuple[int, bytes]], examine: Examine) -> _Lot:
    found = _Lot([], [], [], [], [])
    positions, sizes, hashes, crcs, faults = found
    for position, data in lot:
        try:
            width, height, digest = examine(data)
        except ImageError as error:
            width, height, digest = 0, 0, b""
            faults.append(Fault(position, "unreadable image", f"unreadable image ({error})"))
        positions.append(position)
        sizes.append((width, height))
        hashes.append((digest or hashlib.sha256(data).digest())[:16])
        crcs.append(zlib.crc32(data))
    return found
