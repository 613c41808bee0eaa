"""Columns of a safetensors file as numpy arrays on its bytes: nothing is copied, nothing is parsed but the header.

The safetensors library copies every tensor it loads; an index of 100 million samples has 5 GB. Its format is simple:
8 bytes (little-endian) with the length of a JSON header, that header, and the tensors' bytes without gaps.

A file that is cut short while it is mapped kills the process that touches the lost part (SIGBUS). So its size is
checked when it is mapped, small files are read instead, and whoever replaces an index must rename, as packers do.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Buffer", "MalformedError", "columns_of", "map_file"]

Buffer = bytes | mmap.mmap

_HEADER_LIMIT = 1 << 20  # ours has some 700 bytes
_TYPES = {"U8": "<u1", "I32": "<i4", "U32": "<u4", "U64": "<u8"}


class MalformedError(ValueError):
    """Not the safetensors file it should be; the text says why."""


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """The first `size` (> 0) bytes of an open file, read only. Keeps the descriptor's file open, and its flock held."""
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)


def columns_of(data: Buffer, wanted: Mapping[str, np.dtype[Any]]) -> dict[str, np.ndarray]:
    """One-dimensional arrays on `data`, exactly those `wanted`; not writable.

    Raises:
        MalformedError: another set of tensors, another type or shape, or a header that is damaged.
    """
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(_HEADER_LIMIT, size - 8):
        raise MalformedError("no safetensors header")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise MalformedError("its header is no JSON object")
    header.pop("__metadata__", None)
    if header.keys() != wanted.keys():
        raise MalformedError(f"columns {', '.join(sorted(header))} instead of {', '.join(sorted(wanted))}")
    start, columns, spans = 8 + length, {}, []
    for name, dtype in wanted.items():
        begin, end, kind, number = _column(name, header[name])
        if kind != dtype:
            raise MalformedError(f"column {name} is of the wrong type")
        if end - begin != number * dtype.itemsize or start + end > size:
            raise MalformedError(f"column {name} does not fit its place")
        spans.append((begin, end))
        columns[name] = np.frombuffer(data, dtype=kind, count=number, offset=start + begin)
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise MalformedError("its columns overlap or leave a gap")
        reached = end
    if start + reached != size:
        raise MalformedError(f"{size:,} bytes where its header says {start + reached:,}")
    return columns


def _column(name: str, entry: Any) -> tuple[int, int, np.dtype[Any], int]:
    """(begin, end, type, length) of one column in the header."""
    try:
        begin, end = entry["data_offsets"]
        [number] = entry["shape"]
        kind = np.dtype(_TYPES[entry["dtype"]])
    except (KeyError, TypeError, ValueError):
        raise MalformedError(f"column {name} has another type or shape") from None
    if not all(type(value) is int and value >= 0 for value in (begin, end, number)) or begin > end:
        raise MalformedError(f"column {name} has no place")
    return begin, end, kind, number
