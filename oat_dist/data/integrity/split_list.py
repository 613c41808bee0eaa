"""The splits of a set, from the folder or URL that a user gives."""

from __future__ import annotations

from pathlib import Path

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME
from oat_dist.data.remote.fetch import NotThereError, fetch_bytes, is_url, join_location, local_path, shown
from oat_dist.errors import DataError

__all__ = ["find_splits", "split_name"]

# A URL cannot be listed on every protocol: these are looked for.
_REMOTE_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def find_splits(output: Path | str) -> list[str]:
    """Folders or URLs of the splits in `output` by name, or `output` itself when it is one.

    A folder counts as a split, maybe a damaged one, if a manifest, an index or tars lie in it.

    Raises:
        DataError: there is none.
    """
    if is_url(output):
        return _find_remote(str(output))
    folder = Path(local_path(output))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give what pack or index was given as OUTPUT, or one split in it")
    if _looks_packed(folder):
        return [str(folder)]
    found = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".") and _looks_packed(entry)]
    if not found:
        raise DataError(f"{folder}: holds no packed split; pack a data set first (shards/pack.py)")
    return list(map(str, found))


def split_name(location: str) -> str:
    """The last part of a location from `find_splits`."""
    if is_url(location):
        return location.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(location).resolve().name


def _looks_packed(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).exists() for name in (MANIFEST_NAME, INDEX_NAME)) or any(folder.glob("*.tar"))
    )


def _find_remote(url: str) -> list[str]:
    def there(location: str) -> bool:
        try:
            fetch_bytes(join_location(location, MANIFEST_NAME))
        except NotThereError:
            return False
        return True

    if there(url):
        return [url]
    found = [place for name in _REMOTE_SPLITS if there(place := join_location(url, name))]
    if not found:
        raise DataError(
            f"{shown(url)}: no packed split there, nor below it as {', '.join(_REMOTE_SPLITS)}; check the URL, or give "
            "that of one split"
        )
    return found
