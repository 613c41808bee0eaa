"""From what a user writes (paths, wildcards, braces, folders, URLs) to the list of shards, in a fixed order."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from oat_dist.data.remote.fetch import is_url, local_path, shown, shown_text
from oat_dist.errors import DataError

__all__ = ["Shard", "find_shards"]

_WILD = re.compile(r"[*?[]")
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXAMPLE = "give tars, folders of tars, wildcards, braces such as {000000..000012}, or URLs"


class Shard(NamedTuple):
    """One tar: its name in the manifest (a plain file name, unique in the set), and where it lies."""

    name: str
    location: str  # an absolute path, or a URL


def find_shards(patterns: Sequence[str | os.PathLike[str]]) -> list[Shard]:
    """All shards, in the order of the patterns; those of a folder or a wildcard by name.

    Raises:
        DataError: a pattern that finds nothing, or something else than tars; a shard that is named twice.
    """
    locations = [place for pattern in patterns for place in _expand(os.fspath(pattern))]
    if not locations:
        raise DataError(f"no shards given; {_EXAMPLE}")
    seen: set[str] = set()
    for place in locations:
        if place in seen:
            raise DataError(f"{shown(place)}: named twice; leave one of them out")
        seen.add(place)
    names = [posixpath.basename(unquote(urlsplit(place).path) if is_url(place) else place) for place in locations]
    if len(set(names)) < len(names):  # of several folders, each with its 00000.tar
        names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
    return [Shard(name, place) for name, place in zip(names, locations, strict=True)]


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise DataError(f"{pattern}: what a command writes cannot be indexed; train on it with data.mode=stream")
    if is_url(pattern):
        return [url for part in _braces(pattern) for url in _remote(part)]
    pattern = local_path(pattern)
    parts = [pattern] if Path(pattern).exists() else _braces(pattern)
    return [path for part in parts for path in _local(part)]


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"{shown(pattern)}: a brace is not closed; write a range as {{000000..000012}}") from None


def _local(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(str(entry) for entry in path.glob("*.tar"))
        if not found:
            packed = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(_PACKED_TARS))
            if packed:
                raise DataError(f"{path}: its tars are compressed ({packed[0]}); unpack them to plain .tar first")
            raise DataError(f"{path}: holds no *.tar; {_EXAMPLE}")
    elif path.exists():
        found = [pattern]
    elif _WILD.search(pattern):
        root = path.anchor or "."
        found = sorted(map(str, Path(root).glob(str(path.relative_to(root)))))
        if not found:
            raise DataError(f"{pattern}: no file has such a name; {_EXAMPLE}")
        folders = [name for name in found if Path(name).is_dir()]
        if folders:
            return [name for folder in found for name in _local(folder)]
    else:
        raise DataError(f"{pattern}: no such file; {_EXAMPLE}")
    # the folder resolved, the name not: a link's own name is the shard's, not that of what it points to
    return [str(Path(name).parent.resolve() / Path(name).name) for name in found]


def _remote(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc
    except ValueError as error:
        raise DataError(f"{shown(url)}: is no URL ({shown_text(str(error))}); mend it") from None
    try:
        _ = parts.port
    except ValueError:  # a password with "/" in it
        secret = secret or "@" in url
    if secret or "?" in url:
        what = "a user name or password" if secret else "a query (?...)"
        raise DataError(
            f"{shown(url)}: holds {what}, and the manifest would keep it; leave it out, and give the credentials in "
            "~/.netrc or the environment (see docs/remote.md)"
        )
    if _WILD.search(parts.netloc + parts.path):
        raise DataError(f"{shown(url)}: wildcards work for local files only; write braces such as {{000000..000012}}")
    if not posixpath.basename(parts.path):
        raise DataError(f"{shown(url)}: names no file; give the URL of a tar, with braces for several")
    return [url]
