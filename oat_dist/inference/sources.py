"""Where images lie: files, folders, tars, packed splits, lists of paths. All of it is walked as it is used.

Names inside tars are text: they are shown, and never become paths. What cannot be read is told to `problem`, and left
out.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, ShardSet, open_split
from oat_dist.data.sources.folders import IMAGES
from oat_dist.data.storage import ShardReader
from oat_dist.data.tars.tarstream import TarStream
from oat_dist.errors import DataError
from oat_dist.inference.images import LARGEST_FILE, read_file

__all__ = ["Item", "find_images", "listed"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_USTAR_AT, _USTAR = 257, b"ustar"
_CHUNK = 1 << 16
# What a damaged archive, compressed or not, raises while it is read.
_DAMAGED = (DataError, OSError, EOFError, zlib.error, lzma.LZMAError)

Problem = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """An image that has been found.

    Attributes:
        file: the path of a file, tar or packed split.
        member: its name inside of that; None: the file itself.
        read: gives the bytes; called in another thread. Raises DataError.
        held: bytes that wait in memory already.
    """

    file: str
    member: str | None
    read: Callable[[], bytes]
    held: int = 0

    @property
    def name(self) -> str:
        return self.file if self.member is None else f"{self.file}:{self.member}"


def find_images(inputs: Iterable[str], problem: Problem) -> Iterator[Item]:
    """The images of all inputs: files as given, folders and what is below them in order of names, tars as stored.

    Args:
        inputs: paths of images, folders, tars (also compressed with gzip, bzip2 or xz) and packed splits.
        problem: told, in one line each, what cannot be read.
    """
    for text in inputs:
        path = Path(text)
        try:
            if path.is_dir():
                yield from _or_problem(_below(path, problem), f"{text}: holds no images", problem)
            elif _is_tar(path):
                yield from _or_problem(_in_tar(path, problem), f"{text}: holds no images", problem)
            else:
                yield _file(text)
        except (OSError, ValueError) as error:  # not there, no permission; a name that no file can have
            problem(f"{text}: cannot be read ({getattr(error, 'strerror', None) or error})")


def listed(stream: BinaryIO) -> Iterator[str]:
    """The paths of a list, one a line; or separated by NUL characters, as ``find -print0`` writes them."""
    rest, separator = b"", b""
    while chunk := stream.read(_CHUNK):
        separator = separator or (b"\0" if b"\0" in chunk else b"\n")
        *whole, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(path) for path in whole if path)
    if rest:
        yield os.fsdecode(rest)


def _or_problem(items: Iterator[Item | None], text: str, problem: Problem) -> Iterator[Item]:
    """The items; without any, and without a problem (None) either, that is a problem."""
    empty = True
    for item in items:
        empty = False
        if item is not None:
            yield item
    if empty:
        problem(text)


def _file(text: str) -> Item:
    return Item(text, None, functools.partial(read_file, Path(text)))


def _is_tar(path: Path) -> bool:
    """Known by its name, or by its first bytes."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(_TARS):
        return True
    if _ending(path.name) in IMAGES.suffixes:
        return False
    with path.open("rb") as file:
        return file.read(_USTAR_AT + len(_USTAR))[_USTAR_AT:] == _USTAR


def _open_tar(path: Path) -> io.BufferedReader:
    name = path.name.lower()
    if name.endswith((".gz", ".tgz")):
        return cast(io.BufferedReader, gzip.open(path))
    if name.endswith(".bz2"):
        return cast(io.BufferedReader, bz2.open(path))
    return cast(io.BufferedReader, lzma.open(path)) if name.endswith(".xz") else path.open("rb")


def _ending(name: str) -> str:
    return f".{name.lower().rpartition('.')[2]}"


def _below(top: Path, problem: Problem) -> Iterator[Item | None]:
    """Images, tars and packed splits below a folder; each real folder once, since links may loop. Hidden ones not."""
    walked: set[tuple[int, int]] = set()
    waiting = [str(top)]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 - a Path for each of millions of names takes time
            if (status.st_dev, status.st_ino) in walked:
                continue
            walked.add((status.st_dev, status.st_ino))
            files, folders = _entries(folder)
        except OSError as error:
            problem(f"{folder}: cannot be read ({error.strerror})")
            yield None
            continue
        if MANIFEST_NAME in files and INDEX_NAME in files:
            yield from _in_split(Path(folder), problem)
            continue
        for name in files:
            path = f"{folder}/{name}"
            if _ending(name) in IMAGES.suffixes:
                yield _file(path)
            elif name.lower().endswith(_TARS):
                if Path(path).is_file():
                    yield from _in_tar(Path(path), problem)
                else:  # a pipe would be waited for
                    problem(f"{path}: not a regular file")
                    yield None
        waiting += [f"{folder}/{name}" for name in reversed(folders)]


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Visible files and folders, in the order of their names as bytes."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name != "__MACOSX":
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(files, key=os.fsencode), sorted(folders, key=os.fsencode)


def _in_tar(path: Path, problem: Problem) -> Iterator[Item | None]:
    """The images of a tar, read in one pass; other members are passed over."""
    try:
        with _open_tar(path) as file:
            stream = TarStream(file.read1)  # what is there of a damaged one, where read() would give nothing
            for name, _, size in stream:
                base = name.rpartition("/")[2]
                if base.startswith(".") or _ending(base) not in IMAGES.suffixes:
                    continue
                if size > LARGEST_FILE:
                    problem(f"{path}:{name}: {size:,} bytes, more than an image file may have ({LARGEST_FILE:,})")
                    yield None
                    continue
                data = stream.content()
                yield Item(str(path), name, functools.partial(_given, data), len(data))
    except _DAMAGED as error:
        problem(f"{path}: {getattr(error, 'strerror', None) or error}; what comes after that is left out")
        yield None


def _given(data: bytes) -> bytes:
    return data


def _in_split(folder: Path, problem: Problem) -> Iterator[Item | None]:
    """The images of a packed split in the order of sample ids, by the names they were packed under."""
    try:
        shards = open_split(folder)
    except DataError as error:
        problem(str(error))
        yield None
        return
    reader = ShardReader(shards)  # not closed here: threads still read from it when the last item is out
    for number in range(shards.num_samples):
        yield Item(str(folder), _packed_name(shards, number), functools.partial(reader.read, number))


def _packed_name(shards: ShardSet, number: int) -> str:
    return shards.index.name(number) or str(number)
