"""The folder of an indexed split: whether it may be written, what is there already, how it names its shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oat_dist.data.foreign.rules import Rules
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Manifest
from oat_dist.data.remote.fetch import is_url
from oat_dist.errors import DataError
from oat_dist.files import folder_lock

__all__ = ["NOT_OURS_NAME", "check_free", "classes_there", "rules_of", "url_for", "work_folder"]

# Beside tars that lie in the split's own folder: packers replace a folder of nothing but tars, manifest and index.
NOT_OURS_NAME = ".not-packed"


def rules_of(manifest: Manifest) -> Rules | None:
    """How the samples of an indexed split are read from its tars; None: it was packed by us.

    Raises:
        DataError: the rules in the manifest are damaged.
    """
    if "rules" not in manifest.index:
        return None
    try:
        values = dict(manifest.index["rules"])
        return Rules(**{**values, "images": tuple(values["images"])})
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"damaged manifest (rules: {error}); index the shards again") from error


@contextmanager
def work_folder(output: Path, split: str) -> Iterator[Path]:
    """A hidden folder, emptied before and removed afterwards, while no packer is at work beside it."""
    refusal = f"{output}: another process is writing into this folder; wait for it, or choose another folder"
    with folder_lock(output, refusal, name=".packing.lock"):
        work = output / f".indexing-{split}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_free(folder: Path, overwrite: bool) -> None:
    """The tars may lie in the folder itself; only an index of ours is ever replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file is in the way; move it, or choose another folder")
    path = folder / MANIFEST_NAME
    if not path.exists() and not (folder / INDEX_NAME).exists():
        return
    if not overwrite:
        raise DataError(f"{folder}: is indexed already; choose another folder or --split, or replace it: --overwrite")
    try:
        foreign = rules_of(Manifest.from_json(path.read_text(encoding="utf-8"), path)) is not None
    except (OSError, UnicodeDecodeError, DataError):
        raise DataError(f"{path}: missing or damaged, so what is here will not be replaced; move it away") from None
    if not foreign:
        raise DataError(f"{folder}: holds a packed split, which will not be replaced; choose another folder or --split")


def classes_there(output: Path, split: str) -> tuple[list[str] | None, str]:
    """The classes of a split beside this one: all splits of a set share them."""
    for path in sorted(output.glob(f"[!.]*/{MANIFEST_NAME}")):
        if path.parent.name != split:
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); mend that or move it away") from None
            return Manifest.from_json(text, path).classes, str(path)
    return None, ""


def url_for(location: str, folder: Path) -> str:
    """What the manifest says of a place: relative if it lies beside OUTPUT or in it, so that both can move."""
    near = folder.parent.parent
    if is_url(location) or near == Path(near.anchor) or not Path(location).is_relative_to(near):
        return location
    return os.path.relpath(location, folder)
