"""Files that are either absent or complete: atomic writes, checksums, folder locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from oat_dist.errors import OatError

__all__ = [
    "FolderBusyError",
    "folder_lock",
    "fsync_file",
    "fsync_folder",
    "lock_holder",
    "sha256_bytes",
    "sha256_file",
    "write_atomic",
    "write_named",
]


class FolderBusyError(OatError):
    """Another process holds the lock of a folder."""


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_named(path: Path, data: bytes) -> None:
    """Write to a path that a user names: a link keeps its place, a device or pipe is written to, a file is replaced
    as a whole."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        write_atomic(path, data)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def folder_lock(folder: Path, refusal: str, *, name: str = ".lock") -> Iterator[None]:
    """Hold an exclusive lock on `folder` (made if missing); the kernel frees it when the process dies.

    Raises:
        FolderBusyError: with the text `refusal`, when another process holds it.
        OatError: a folder that cannot be made or written to, or whose file system does not lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a")
    except OSError as error:
        raise OatError(f"{folder}: cannot be made or written to ({error.strerror}); choose another folder") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(refusal) from None
        except OSError as error:
            raise OatError(
                f"{folder}: its file system does not lock files ({error.strerror}); choose a folder on another one"
            ) from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        yield


def lock_holder(folder: Path, *, name: str = ".lock") -> str:
    """`` (HOST, process PID)`` of who holds the lock of `folder`, as far as it says so; else empty."""
    try:
        text = (folder / name).read_text(errors="replace").strip()
    except OSError:
        return ""
    return f" ({text[:200]})" if text else ""
