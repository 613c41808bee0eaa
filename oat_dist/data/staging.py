"""Folders that appear whole or not at all.

Work goes into a hidden sibling, `.packing-NAME`, renamed to NAME when all is written and on disk. A process
that dies leaves at most that hidden folder, which the next one removes. One writer at a time per parent.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME
from oat_dist.errors import DataError
from oat_dist.files import folder_lock, fsync_folder

__all__ = ["staged_folders"]

_NEW = ".packing-"
_OLD = ".replaced-"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def staged_folders(parent: Path, names: Sequence[str], *, overwrite: bool) -> Iterator[list[Path]]:
    """Yield one new, empty folder per name; at the end each becomes `parent/name`, on an error all vanish.

    The caller syncs the files it writes. `overwrite` replaces a packed split, and nothing but a packed split.

    Raises:
        DataError: a name that is taken, a full disk, a parent that cannot be written.
        OatError: another process is packing into `parent`.
    """
    refusal = f"{parent}: another process is packing into this folder; wait for it, or choose another folder"
    try:
        with folder_lock(parent, refusal, name=".packing.lock"):
            _clear_leftovers(parent)
            for name in names:
                _check_free(parent / name, overwrite)
            staged = [parent / f"{_NEW}{name}" for name in names]
            try:
                for folder in staged:
                    folder.mkdir()
                yield staged
                for folder in staged:
                    fsync_folder(folder)
                for folder, name in zip(staged, names, strict=True):
                    _put_in_place(folder, parent / name)
            except BaseException:
                for folder in staged:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DataError(
                f"{parent}: no room left on the disk ({error.strerror}); nothing was packed, "
                "free some space or choose another folder"
            ) from error
        raise DataError(
            f"{error.filename or parent}: cannot write here ({error.strerror}); nothing was packed"
        ) from error


def _clear_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{_NEW}*/"):
        shutil.rmtree(folder)
    for folder in parent.glob(f"{_OLD}*/"):
        name = folder.name.removeprefix(_OLD)
        if (parent / name).exists():
            shutil.rmtree(folder)
        else:  # killed between the two renames of _put_in_place: the old one is the last whole one
            folder.rename(parent / name)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: a file is in the way; move it, or choose another folder")
    entries = sorted(entry.name for entry in folder.iterdir())
    if not overwrite and entries:
        raise DataError(f"{folder}: already exists; choose another folder, or replace it: --overwrite (overwrite=True)")
    foreign = [name for name in entries if name not in (MANIFEST_NAME, INDEX_NAME) and not name.endswith(".tar")]
    if foreign or (entries and MANIFEST_NAME not in entries):
        named = f"holds {foreign[0]!r}" if foreign else f"has no {MANIFEST_NAME}"
        raise DataError(f"{folder}: will not be replaced, it {named} and so is no mere packed split; move it away")


def _put_in_place(new: Path, place: Path) -> None:
    old = place.with_name(f"{_OLD}{place.name}")
    if place.exists():
        place.rename(old)
    new.rename(place)
    fsync_folder(place.parent)
    if old.exists():
        shutil.rmtree(old)
