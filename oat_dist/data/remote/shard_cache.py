"""Remote files kept whole in a local folder, shared by all processes of a machine; no server, only the file system.

    FOLDER/shards/<sha256>         a whole, verified file; its time of modification is when it was last used
    FOLDER/shards/<sha256>.part    being fetched by whoever holds a lock on it
    FOLDER/shards/.lock            held for a moment by whoever looks for room

1. Who needs a file and does not find it locks its `.part` and fetches it; others wait for the lock or the file.
2. A `.part` has its final size from the start, so that its place is counted; without a lock it is dead and removed.
3. Checked and synced, it is renamed: under its name a file is whole or absent.
4. Readers share a lock on the file. When the limit is reached, those are removed that were not used for longest and
   that nobody has locked.

All locks are flock: the kernel drops them with the process. They need a local file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oat_dist.data.remote.fetch import StoppedError, download, shown
from oat_dist.errors import DataError

__all__ = ["RemoteFile", "ShardCache", "default_cache_dir"]

_POLL_S = 0.05
_TOUCH_S = 2.0
# What is fetched ahead of need takes the place only of what nobody has read for so long.
IDLE_S = 10.0
# Someone needs room and nobody is fetching: whatever is locked then will stay so.
ROOM_WAIT_S = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PART = ".part"


def default_cache_dir(cache_dir: Path | str | None = None) -> Path:
    """`cache_dir`, else $OAT_DIST_CACHE, else ~/.cache/oat_dist."""
    given = cache_dir or os.environ.get("OAT_DIST_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "oat_dist"


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL: its size in bytes, its SHA-256 in hex ("": not known)."""

    url: str
    size: int
    sha256: str


class ShardCache:
    """A folder of fetched files with a limit on their bytes. Any number of threads and processes may share the folder.

    Args:
        folder: None: see `default_cache_dir`. Made when first needed.
        limit: most bytes of all files together; None: as much as the disk holds.
    """

    def __init__(self, folder: Path | str | None = None, limit: int | None = None) -> None:
        self.folder = default_cache_dir(folder)
        self.limit = limit
        self._shards = self.folder / "shards"
        self._paths: dict[RemoteFile, Path] = {}
        self._touched: dict[Path, float] = {}

    def check(self, file: RemoteFile) -> None:
        """Refuse a file larger than the cache (DataError)."""
        if self.limit is not None and file.size > self.limit:
            raise DataError(
                f"{shown(file.url)} has {file.size:,} bytes, more than the cache may hold ({self.limit:,}); "
                "raise data.cache_gb, or pack with a smaller --shard-bytes"
            )

    def open(self, file: RemoteFile, stop: threading.Event | None = None) -> int:
        """A descriptor of the whole file, fetched first if need be. Close it soon: it keeps its place from others.

        Raises:
            DataError: it cannot be fetched, or there is no room; names URL or folder, cause and remedy.
            StoppedError: `stop` was set meanwhile.
        """
        descriptor = self._obtain(file, stop or threading.Event(), ahead=False)
        assert descriptor is not None
        return descriptor

    def fetch_ahead(self, file: RemoteFile, stop: threading.Event) -> bool:
        """Fetch a file that will be needed; False when that must wait: no room yet, or another process fetches it.

        Raises:
            DataError, StoppedError: as `open`.
        """
        descriptor = self._obtain(file, stop, ahead=True)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def holds(self, file: RemoteFile) -> bool:
        """Whether the file is here now."""
        return self._path(file).exists()

    def _path(self, file: RemoteFile) -> Path:
        path = self._paths.get(file)
        if path is None:
            # The whole URL: its query may tell files apart.
            name = file.sha256 or f"url-{hashlib.sha256(f'{file.url} {file.size}'.encode()).hexdigest()}"
            path = self._paths[file] = self._shards / name
        return path

    def _obtain(self, file: RemoteFile, stop: threading.Event, *, ahead: bool) -> int | None:
        path = self._path(file)
        try:
            while not stop.is_set():
                descriptor = self._open_whole(path, file.size)
                if descriptor is None:
                    descriptor = self._fetch(file, path, stop, ahead=ahead)
                if descriptor is not None or ahead:
                    return descriptor
                stop.wait(_POLL_S)
        except OSError as error:
            raise self._explained(error, file) from error
        raise StoppedError

    def _open_whole(self, path: Path, size: int) -> int | None:
        """The file if it is there, with a shared lock."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            found = os.fstat(descriptor)
            if found.st_nlink and found.st_size == size:
                now = time.monotonic()
                if now - self._touched.get(path, -_TOUCH_S) >= _TOUCH_S:
                    self._touched[path] = now
                    with contextlib.suppress(OSError):  # somebody else's file in a shared folder, or read only
                        os.utime(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if found.st_nlink:  # damaged by someone
            path.unlink(missing_ok=True)
        return None

    def _fetch(self, file: RemoteFile, path: Path, stop: threading.Event, *, ahead: bool) -> int | None:
        """Fetch the file and return it with a shared lock; None: another process is at it or was, or no room yet."""
        self.check(file)
        self._shards.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        try:
            with self._looking_for_room():  # else one that looks for dead parts may take this for one, unlocked yet
                descriptor = _lock_now(part, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            if part.exists() and _is_locked(part):  # another user fetches it
                return None
            raise
        if descriptor is None:
            return None
        try:
            if path.exists() or not self._reserve(descriptor, file, stop, ahead=ahead):
                part.unlink()
                os.close(descriptor)
                return None
            os.posix_fallocate(descriptor, 0, file.size)
            download(file.url, descriptor, file.size, file.sha256, stop)
            os.fdatasync(descriptor)
            part.rename(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, descriptor: int, file: RemoteFile, stop: threading.Event, *, ahead: bool) -> bool:
        """Make the claimed `.part` as large as the file will be, once there is room for it."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while not stop.is_set():
            with self._looking_for_room():
                busy, stuck = self._remove_dead_parts()
                if self.limit is None or self._evict(self.limit - busy - stuck - file.size, IDLE_S if ahead else 0.0):
                    os.ftruncate(descriptor, file.size)
                    return True
            if ahead:
                return False
            if busy:
                deadline = time.monotonic() + ROOM_WAIT_S
            elif time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder}: no room for {file.size:,} bytes more: all that is in this cache of {self.limit:,} "
                    "bytes is in use; raise data.cache_gb"
                )
            stop.wait(4 * _POLL_S)
        raise StoppedError

    @contextlib.contextmanager
    def _looking_for_room(self) -> Iterator[None]:
        path = self._shards / ".lock"
        try:  # not for writing, nor O_CREAT: it may be another user's
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _remove_dead_parts(self) -> tuple[int, int]:
        """Remove what killed processes left; the bytes that living ones are fetching, and of dead files not ours."""
        busy = stuck = 0
        for part in self._shards.glob(f"*{_PART}"):
            with contextlib.suppress(FileNotFoundError):
                size = part.stat().st_size
                try:
                    if not _remove_unlocked(part):
                        busy += size
                except PermissionError:
                    stuck += size
        return busy, stuck

    def _evict(self, allowed: int, idle: float) -> bool:
        """Remove the files used longest ago until the rest have at most `allowed` bytes; whether that was reached.

        Nothing is removed where it cannot be. What another user has put there, and we may not remove, is in use.
        """
        files = []
        for entry in os.scandir(self._shards):
            if not entry.name.endswith(_PART) and entry.name != ".lock":
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    files.append((facts.st_mtime, facts.st_size, Path(entry.path)))
        used = sum(size for _, size, _ in files)
        old = [(size, path) for used_at, size, path in sorted(files) if time.time() - used_at >= idle]
        if used - sum(size for size, _ in old) > allowed:
            return False
        chosen, rest = [], used
        for size, path in old:
            if rest <= allowed:
                break
            if _is_removable(path):
                chosen.append((size, path))
                rest -= size
        if rest > allowed:
            return False  # nothing is gained by removing some
        for size, path in chosen:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if _remove_unlocked(path):
                    used -= size
        return used <= allowed

    def _explained(self, error: OSError, file: RemoteFile) -> DataError:
        if error.errno in _FULL:
            free = ""
            with contextlib.suppress(OSError):
                free = f", {shutil.disk_usage(self.folder).free:,} are free"
            return DataError(
                f"{self.folder}: the disk is full: {shown(file.url)} needs {file.size:,} bytes{free}; make room, set "
                "data.cache_gb to less than there is, or data.cache_dir to a larger disk"
            )
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return DataError(
                f"{self.folder}: its file system does not lock files ({error.strerror}); set data.cache_dir to a "
                "folder on a local disk"
            )
        return DataError(
            f"{self.folder}: the cache cannot be used ({error.strerror}); set data.cache_dir to another folder"
        )


def _is_locked(path: Path) -> bool:
    descriptor = _lock_now(path, os.O_RDONLY)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _is_removable(path: Path) -> bool:
    """Whether nobody has a lock on the file and it may be removed by us."""
    try:
        descriptor = _lock_now(path, os.O_RDONLY)
        if descriptor is None:
            return False
        owner = os.fstat(descriptor).st_uid
        os.close(descriptor)
        folder = path.parent.stat()
    except (FileNotFoundError, PermissionError):
        return False
    # In a folder like /tmp only its owner and the file's may remove a file.
    return not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, owner, folder.st_uid)


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless anybody has a lock on it; whether it is gone."""
    descriptor = _lock_now(path, os.O_RDONLY)
    if descriptor is None:
        return False
    try:
        path.unlink()
    finally:
        os.close(descriptor)
    return True


def _lock_now(path: Path, flags: int) -> int | None:
    """The file with an exclusive lock; None when anybody has a lock on it, or has moved it away meanwhile."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
