"""Has the data of a sample changed since an interrupted pack? 64 bits that tell, without reading its file.

A file counts as the same while its size and its time of modification are. Of a callable its code counts and what is
bound to it, files among that as above; what it reads otherwise cannot be seen.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import types
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from oat_dist.data.packing.samples import Sample

__all__ = ["UNKNOWN_SIZE", "SourceStamp", "Stamper", "stamp_file"]

UNKNOWN_SIZE = -1
_DEPTH = 6  # of things bound to things
_LARGE_ITEMS, _LARGE_BYTES = 64, 4096


class SourceStamp(NamedTuple):
    """Size in bytes (-1: not known before reading), and a number that changes with the content."""

    size: int
    stamp: int


def stamp_file(path: str | bytes) -> SourceStamp:
    """(-1, 0) for a file that is missing; that is found out again when it is read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each of millions costs more than the call
    except (OSError, ValueError):
        return SourceStamp(UNKNOWN_SIZE, 0)
    return SourceStamp(status.st_size if stat.S_ISREG(status.st_mode) else UNKNOWN_SIZE, status.st_mtime_ns)


class Stamper:
    """Stamps samples, and remembers the large things that many of them share."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, bytes]] = {}  # by id; holds the object, so that no other gets its id

    def stamp(self, sample: Sample) -> SourceStamp:
        data = sample.data
        if isinstance(data, (str, os.PathLike)):
            return stamp_file(os.fspath(data))
        if isinstance(data, bytes):
            return SourceStamp(len(data), _to_int(_hash(data)))
        return SourceStamp(UNKNOWN_SIZE, _to_int(self._digest(data, _DEPTH)))

    def _digest(self, value: object, depth: int) -> bytes:
        if not _is_large(value):
            return self._compute(value, depth)
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, self._compute(value, depth))
        return self._seen[id(value)][1]

    def _compute(self, value: object, depth: int) -> bytes:
        parts = self._parts(value, depth - 1) if depth else ()
        return _hash(b"".join((_hash(type(value).__qualname__.encode()), *parts)))

    def _parts(self, value: object, depth: int) -> Iterator[bytes]:
        """Digests of what tells `value` from others of its type in any process: no addresses, and no `hash`."""
        if isinstance(value, bytes):
            yield _hash(value)
        elif isinstance(value, (str, int, float, complex, np.generic)):
            yield _hash(repr(value).encode(errors="surrogateescape"))
        elif isinstance(value, os.PathLike):
            path = os.fspath(value)
            yield _hash(os.fsencode(path))
            yield _hash(repr(tuple(stamp_file(path))).encode())
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield _hash(f"{value.dtype.str} {value.shape}".encode())
            yield _hash(np.ascontiguousarray(value).data)
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield self._digest(item, depth)
        elif isinstance(value, dict):
            for item in value.items():
                yield self._digest(item, depth)
        elif isinstance(value, functools.partial):
            yield self._digest((value.func, value.args, value.keywords), depth)
        elif isinstance(value, types.MethodType):
            yield self._digest((value.__func__, value.__self__), depth)
        elif isinstance(value, types.FunctionType):
            yield _hash(f"{value.__module__}.{value.__qualname__}".encode())
            code = value.__code__
            constants = tuple(item for item in code.co_consts if not isinstance(item, types.CodeType))
            yield self._digest((code.co_code, code.co_names, constants), depth)
            yield self._digest((value.__defaults__, value.__kwdefaults__, _bound(value)), depth)


def _bound(function: types.FunctionType) -> tuple[object, ...]:
    """What a closure holds; a variable that is not set yet is left out."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return tuple(found)


def _is_large(value: object) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return len(value) > _LARGE_ITEMS
    size = len(value) if isinstance(value, bytes) else value.nbytes if isinstance(value, np.ndarray) else 0
    return size > _LARGE_BYTES


def _hash(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _to_int(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
