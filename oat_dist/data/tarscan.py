"""What lies where in a tar."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from oat_dist.errors import DataError

__all__ = ["TarMember", "scan_tar"]


class TarMember(NamedTuple):
    """A regular file in a tar: its name, and the place of its content in bytes from the tar's start."""

    name: str
    offset: int
    size: int


def scan_tar(path: Path) -> list[TarMember]:
    """The regular files of an uncompressed tar, in their order. Reads headers only.

    A damaged header in the middle ends the list early (as it does for every tar reader): compare the count.

    Raises:
        DataError: not a tar, or cut short.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return [TarMember(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole tar ({error}); restore it or pack again") from error
