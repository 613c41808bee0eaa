"""Finished shards of a pack that is still going on: `part-JOB-NUMBER.tar`, and beside it a file of what lies where.

That file is written last, so a tar without it is unfinished. A part covers positions `start` to `stop` of its split's
packing order; one whose images were all left out has no tar.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from oat_dist.files import write_atomic

__all__ = [
    "COLUMNS",
    "Part",
    "clear_all_but",
    "clear_rows",
    "finished_parts",
    "part_tar",
    "part_tars",
    "parts_of_job",
    "read_part",
    "read_rows",
]

COLUMNS = ("rank", "offset", "length", "width", "height")
_ROWS = ".rows"


@dataclass(frozen=True)
class Part:
    """A finished shard: the digest of its job, what it covers, its size and SHA-256, and the images left out."""

    digest: str
    start: int
    stop: int
    samples: int
    size: int
    sha256: str
    skipped: list[tuple[int, str]]  # rank and reason

    def save(self, tar: Path, rows: np.ndarray) -> None:
        """Mark `tar` as finished. `rows`: (samples, 5) int64, its columns those of COLUMNS."""
        columns = {name: np.ascontiguousarray(rows[:, k]) for k, name in enumerate(COLUMNS)}
        write_atomic(tar.with_suffix(_ROWS), save(columns, {"part": json.dumps(asdict(self))}))


def part_tar(folder: Path, job: int, number: int) -> Path:
    """Padded, so that the order of the names is that of the shards."""
    return folder / f"part-{job:09d}-{number:09d}.tar"


def part_tars(folder: Path) -> list[Path]:
    """In the order of the shards."""
    return sorted(folder.glob("part-*.tar"))


def clear_rows(folder: Path) -> None:
    """Once the tars have other names."""
    for rows in folder.glob(f"part-*{_ROWS}"):
        rows.unlink()


def read_part(tar: Path) -> Part | None:
    """None unless it is finished and its tar has the size it had then."""
    try:
        with safe_open(tar.with_suffix(_ROWS), "numpy") as file:
            part = Part(**json.loads((file.metadata() or {})["part"]))
        size = tar.stat().st_size if part.samples else 0
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return part if size == part.size else None


def read_rows(tar: Path) -> dict[str, np.ndarray]:
    """The columns of a finished part, (samples,) int64 each."""
    return load(tar.with_suffix(_ROWS).read_bytes())


def parts_of_job(folder: Path, job: int, start: int, digest: str, *, allow_skipped: bool) -> dict[Path, Part]:
    """The finished parts of a job from its start on, as far as they follow one another and have its digest."""
    found: dict[Path, Part] = {}
    while True:
        tar = part_tar(folder, job, len(found))
        part = read_part(tar)
        if part is None or (part.digest, part.start) != (digest, start) or (part.skipped and not allow_skipped):
            return found
        found[tar], start = part, part.stop


def finished_parts(folder: Path) -> dict[Path, Part]:
    """All of them by the path of their tar, in the order of the shards."""
    tars = (rows.with_suffix(".tar") for rows in sorted(folder.glob(f"part-*{_ROWS}")))
    return {tar: part for tar in tars if (part := read_part(tar)) is not None}


def clear_all_but(folder: Path, tars: Collection[Path]) -> None:
    """Remove everything from `folder` but these parts."""
    kept = {path for tar in tars for path in (tar, tar.with_suffix(_ROWS))}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()
