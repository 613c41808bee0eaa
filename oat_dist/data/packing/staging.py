"""Folders that appear whole or not at all, and that a later attempt can go on with.

Work goes into a hidden sibling, `.packing-NAME`. When all of them are whole and on disk, `.packing.commit` says so;
from then on the rest is renaming, which whoever comes next completes if this process dies. Before that, an error or a
kill leaves the finished parts (`parts`) for the next attempt. One writer at a time per parent.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Manifest
from oat_dist.data.packing.parts import clear_all_but, clear_rows, finished_parts, part_tars
from oat_dist.errors import DataError
from oat_dist.files import folder_lock, fsync_folder, write_atomic

__all__ = ["staged_folders"]

_NEW = ".packing-"
_OLD = ".replaced-"
_COMMIT = ".packing.commit"  # no split can be called so
_LOCK = ".packing.lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def staged_folders(
    parent: Path, names: Sequence[str], *, overwrite: bool, say: Callable[[str], None]
) -> Iterator[list[Path]]:
    """Yield one folder per name, with the parts that an earlier attempt has finished; at the end each is `parent/name`.

    The caller leaves parts with a manifest and an index in each, and syncs what it writes. On an error the parts that
    are finished stay, everything else vanishes. `overwrite` replaces a packed split, and nothing but a packed split.

    Raises:
        DataError: a name that is taken, a full disk, a parent that cannot be written; any error of the caller's.
        OatError: another process is packing into `parent`.
    """
    refusal = f"{parent}: another process is packing into this folder; wait for it, or choose another folder"
    try:
        with folder_lock(parent, refusal, name=_LOCK):
            _complete(parent)
            _mend_replaced(parent)
            for name in names:
                _check_free(parent / name, overwrite)
            staged = [parent / f"{_NEW}{name}" for name in names]
            _name_others(parent, staged, say)
            try:
                for folder in staged:
                    folder.mkdir(exist_ok=True)
                    clear_all_but(folder, finished_parts(folder))
                yield staged
                for folder in staged:
                    fsync_folder(folder)
            except BaseException as error:
                kept = _leave_finished(staged)
                note = f"{kept:,} finished shard{'s' * (kept > 1)} kept for the next attempt" if kept else ""
                if isinstance(error, OSError):
                    raise _explain(error, parent, note) from error
                if note and isinstance(error, DataError):
                    raise DataError(f"{error}; {note}") from error
                if note:
                    say(note)
                raise
            write_atomic(parent / _COMMIT, json.dumps(list(names)))
            _complete(parent)
    except OSError as error:
        raise _explain(error, parent, "") from error


def _explain(error: OSError, parent: Path, note: str) -> DataError:
    outcome = note or "nothing was packed"
    if error.errno in _NO_ROOM:
        remedy = "free some space" + (" and give the same command again" if note else " or choose another folder")
        return DataError(f"{parent}: no room left on the disk ({error.strerror}); {outcome}, {remedy}")
    return DataError(f"{error.filename or parent}: cannot write here ({error.strerror}); {outcome}")


def _leave_finished(staged: Sequence[Path]) -> int:
    """Clear away what a next attempt cannot use; returns the number of shards that it can."""
    kept = 0
    for folder in staged:
        with contextlib.suppress(OSError):
            parts = finished_parts(folder)
            kept += sum(part.samples > 0 for part in parts.values())
            if parts:
                clear_all_but(folder, parts)
            else:
                shutil.rmtree(folder)
    return kept


def _complete(parent: Path) -> None:
    """Do what a commit still asks for. Every step may have been done before."""
    commit = parent / _COMMIT
    if not commit.exists():
        return
    for name in json.loads(commit.read_bytes()):
        folder = parent / f"{_NEW}{name}"
        if folder.exists():
            _name_shards(folder)
            _put_in_place(folder, parent / name)
    commit.unlink()
    fsync_folder(parent)


def _name_shards(folder: Path) -> None:
    """Give the parts the names that the manifest has for them, and remove what told where their samples lie."""
    path = folder / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_text(encoding="utf-8"), path)
    missing = [folder / shard.name for shard in manifest.shards if not (folder / shard.name).exists()]
    for part, tar in zip(part_tars(folder), missing, strict=True):
        part.rename(tar)
    clear_rows(folder)
    fsync_folder(folder)


def _mend_replaced(parent: Path) -> None:
    for folder in parent.glob(f"{_OLD}*/"):
        name = folder.name.removeprefix(_OLD)
        if (parent / name).exists():
            shutil.rmtree(folder)
        else:  # killed between the two renames of _put_in_place: the old one is the last whole one
            folder.rename(parent / name)


def _name_others(parent: Path, staged: Sequence[Path], say: Callable[[str], None]) -> None:
    for folder in sorted(parent.glob(f"{_NEW}*/")):
        if folder not in staged:
            say(f"{folder}: left by an interrupted pack of another split; give its command again, or remove it")


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
    _check_free(place, overwrite=True)
    old = place.with_name(f"{_OLD}{place.name}")
    if place.exists():
        place.rename(old)
    new.rename(place)
    fsync_folder(place.parent)
    if old.exists():
        shutil.rmtree(old)
