"""Bytes of samples out of local shards, by (shard, offset, length).

`pread` on kept file descriptors: safe from many threads at once, and a shard that is cut short while a run reads it
gives a short read, an error we can name, where a memory map would kill the process with SIGBUS.
"""

from __future__ import annotations

import os
import threading

from oat_dist.data.index import ShardSet
from oat_dist.errors import DataError

__all__ = ["ShardReader"]

MAX_OPEN = 256


class ShardReader:
    """Reads samples of one split; at most `MAX_OPEN` shards are open at a time."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._open: dict[int, int] = {}  # shard number -> descriptor, oldest first
        self._lock = threading.Lock()

    def read(self, sample_id: int) -> bytes:
        """The image file of one sample, as it was packed.

        Raises:
            DataError: the shard is missing, unreadable or too short. Never skipped: this is not a bad sample.
        """
        index = self.shards.index
        shard, length = int(index.shard[sample_id]), int(index.length[sample_id])
        offset = int(index.offset[sample_id])
        path = self.shards.folder / self.shards.manifest.shards[shard].name
        try:
            with self._lock:
                descriptor = self._descriptor(shard)
                # Duplicated, so that another thread may evict the original while we read.
                descriptor = os.dup(descriptor)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); mend that or restore the shard, and start again"
            ) from error
        if len(data) != length:
            raise DataError(
                f"{path}: the shard ends before sample {sample_id} does (offset {offset:,}, {length:,} bytes); "
                "it was cut short: restore it and start again"
            )
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path = self.shards.folder / self.shards.manifest.shards[shard].name
            self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
