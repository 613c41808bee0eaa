"""Bytes of samples out of shards, by (shard, offset, length).

`pread` on descriptors: safe from many threads at once, and a shard that is cut short while a run reads it gives a short
read, an error we can name, where a memory map would kill the process with SIGBUS. Local shards stay open. A remote one
is opened in the cache for each read (some 15 microseconds), so that it never keeps its place there from others;
background threads fetch what has been announced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from oat_dist.data.index import ShardSet
from oat_dist.data.remote.fetch import StoppedError, shown
from oat_dist.data.remote.shard_cache import RemoteFile
from oat_dist.errors import DataError

__all__ = ["ShardReader"]

MAX_OPEN = 256
FETCHERS = 4  # shards fetched at a time in the background, by each process

# What a network file system or a loose cable gives now and then.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENETDOWN)
_RETRY_DELAYS_S = (0.1, 0.5, 2.0)
# A shard that could not be fetched ahead is not tried again for so long: there was no room, or the reader will say why.
_AGAIN_S = 2.0


class ShardReader:
    """Reads samples of one split; at most `MAX_OPEN` shards are open at a time. Used from many threads."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._open: dict[int, _OpenShard] = {}  # by number, oldest first; changed under the lock, read without
        self._lock = threading.Lock()
        self._remote = {  # shard number -> where
            number: place
            for number in range(len(shards.manifest.shards))
            if isinstance(place := shards.place(number), RemoteFile)
        }
        self._stop_reads = threading.Event()
        self._ahead: _Ahead | None = None
        self._said = b"", 0.0  # the last announcement, and until when it need not be repeated

    def read(self, sample_id: int) -> bytes:
        """The image file of one sample, as it was packed.

        Raises:
            DataError: the shard is missing, unreadable or too short, also after some tries, or cannot be fetched.
                Never skipped: this is not a bad sample.
        """
        shard, offset, length = self.shards.row(sample_id)
        remote = self._remote.get(shard)
        data = self._read_local(shard, offset, length) if remote is None else self._read_remote(remote, offset, length)
        if len(data) != length:
            raise DataError(
                f"{self.shards.place(shard)}: the shard ends before sample {sample_id} does (offset {offset:,}, "
                f"{length:,} bytes); it was cut short: restore it and start again"
            )
        return data

    def prefetch(self, ids: np.ndarray) -> None:
        """Announce samples that will be read soon: their remote shards are fetched in the background, in this order.

        Returns at once, and costs nothing where all shards are local. What cannot be fetched now is fetched, or
        reported, when it is read.
        """
        if self._remote and len(ids):
            shards = self.shards.index.shard[ids]
            numbers, first = np.unique(shards, return_index=True)
            self.prefetch_shards(numbers[np.argsort(first)])

    def prefetch_shards(self, numbers: np.ndarray) -> None:
        """Announce whole shards, by number, as `prefetch` does samples."""
        said = numbers.tobytes()
        if not self._remote or (said == self._said[0] and time.monotonic() < self._said[1]):
            return
        self._said = said, time.monotonic() + _AGAIN_S
        with self._lock:
            if self._ahead is None:
                self._ahead = _Ahead(self.shards)
            ahead = self._ahead
        ahead.announce(self._remote[number] for number in numbers.tolist() if number in self._remote)

    def cancel_reads(self) -> None:
        """Make reads that wait for a remote shard fail soon, so that their threads can end."""
        with self._lock:
            self._stop_reads.set()
            self._stop_reads = threading.Event()

    def close(self) -> None:
        """Let go of open shards and stop fetching. A closed reader that is used opens its shards again."""
        self.cancel_reads()
        with self._lock:
            self._open.clear()
            ahead, self._ahead = self._ahead, None
            self._said = b"", 0.0
        if ahead is not None:
            ahead.stop()

    def _read_local(self, shard: int, offset: int, length: int) -> bytes:
        for delay in (*_RETRY_DELAYS_S, None):
            try:
                # Held while it is read: another thread may let go of it meanwhile.
                file = self._open.get(shard) or self._open_shard(shard)
                return os.pread(file.descriptor, length, offset)
            except OSError as error:
                if error.errno not in _TRANSIENT or delay is None:
                    tries = f" in {len(_RETRY_DELAYS_S) + 1} tries" if error.errno in _TRANSIENT else ""
                    raise DataError(
                        f"{self.shards.place(shard)}: cannot be read{tries} ({error.strerror}); mend that or restore "
                        "the shard, and start again"
                    ) from error
            time.sleep(delay)
            with self._lock:
                self._open.pop(shard, None)
        raise AssertionError

    def _open_shard(self, shard: int) -> _OpenShard:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                if len(self._open) >= MAX_OPEN:
                    self._open.pop(next(iter(self._open)))
                path = self.shards.place(shard)
                assert isinstance(path, Path)
                file = self._open[shard] = _OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            return file

    def _read_remote(self, remote: RemoteFile, offset: int, length: int) -> bytes:
        with self._lock:
            stop = self._stop_reads
        try:
            descriptor = self.shards.cache.open(remote, stop)
        except StoppedError:
            raise DataError(f"{shown(remote.url)}: no longer waited for, since the run ends") from None
        try:
            return os.pread(descriptor, length, offset)
        except OSError as error:
            raise DataError(
                f"{self.shards.cache.folder}: a cached shard cannot be read ({error.strerror}); "
                "set data.cache_dir to another disk"
            ) from error
        finally:
            os.close(descriptor)


class _OpenShard:
    """A descriptor, closed when the last one who uses it lets go: no lock and no copy of it for a read."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Ahead:
    """Background threads that fetch announced shards into the cache, first announced first."""

    def __init__(self, shards: ShardSet) -> None:
        self._cache = shards.cache
        self._waiting: OrderedDict[RemoteFile, None] = OrderedDict()
        self._busy: set[RemoteFile] = set()
        self._later: dict[RemoteFile, float] = {}  # not before this moment
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def announce(self, files: Iterable[RemoteFile]) -> None:
        """Fetch these, unless they are there or already announced."""
        with self._changed:
            for file in files:
                known = file in self._waiting or file in self._busy or time.monotonic() < self._later.get(file, 0.0)
                if not known and not self._cache.holds(file):
                    self._waiting[file] = None
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while len(self._threads) < min(FETCHERS, len(self._waiting) + len(self._busy)):
                # Daemons: a process that ends does not wait for what it fetches. Half a file is no file.
                thread = threading.Thread(target=self._run, name="oat-fetch", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stop.is_set())
                if self._stop.is_set():
                    return
                file, _ = self._waiting.popitem(last=False)
                self._busy.add(file)
            done = False
            try:
                with contextlib.suppress(Exception):  # whatever it is: the reader of the shard will meet and report it
                    done = self._cache.fetch_ahead(file, self._stop)
            finally:
                with self._changed:
                    self._busy.discard(file)
                    if not done:
                        self._later[file] = time.monotonic() + _AGAIN_S
