"""Whether output_dir is one folder for all ranks, which can be written to and locked, and has room for the run.

All is tried in a hidden folder inside of it, the workspace: there the practice training saves, too, so that its
checkpoint meets the disk, the quota and the striping of the real ones. It is removed at the end.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from oat_dist.checkpoint import has_checkpoints
from oat_dist.config import Config
from oat_dist.distributed import World
from oat_dist.doctor.looks import Place, Trouble, attempt, by_node, ranks_text, trouble_rows
from oat_dist.doctor.rows import FAIL, PASS, WARN, Row, bytes_text
from oat_dist.errors import OatError
from oat_dist.files import FolderBusyError, folder_lock, lock_holder, write_atomic

__all__ = ["Room", "Workspace", "check_sharing", "judge_room", "room", "saved_bytes"]

_NAME, _ALIVE = ".doctor-", "alive"
_SEEN_SECONDS = 15.0  # network file systems show new files late
_FEW_INODES = 10_000
_INODES = 64  # of a checkpoint, besides one for each rank


@dataclass
class Workspace:
    """A hidden folder in `output_dir`, made by rank 0; `folder` is the same on all ranks."""

    output_dir: Path
    token: str
    made: list[Path] = field(default_factory=list)
    alive: ExitStack = field(default_factory=ExitStack)  # a lock that tells this doctor from one that was killed

    @property
    def folder(self) -> Path:
        return self.output_dir / f"{_NAME}{self.token}"

    @classmethod
    def make(cls, output_dir: Path) -> Workspace:
        """On rank 0.

        Raises:
            OatError: it cannot be made.
        """
        space = cls(output_dir, uuid.uuid4().hex[:12])
        try:
            for parent in [*reversed(output_dir.absolute().parents), output_dir.absolute()]:
                if not parent.is_dir():
                    parent.mkdir()
                    space.made.append(parent)
            _remove_leftovers(output_dir)
            space.folder.mkdir()
            space.alive.enter_context(folder_lock(space.folder, "", name=_ALIVE))
            write_atomic(space.folder / "token", space.token)
        except OSError as error:
            space.remove()
            raise OatError(
                f"output_dir={output_dir}: {error.filename or 'a file in it'} cannot be made ({error.strerror}); "
                "choose another output_dir, or mend its rights"
            ) from error
        return space

    def remove(self) -> None:
        """The folder, and what was made for it and is empty now."""
        self.alive.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in reversed(self.made):
            with suppress(OSError):  # somebody uses it by now
                parent.rmdir()


def _remove_leftovers(output_dir: Path) -> None:
    """Of doctors that were killed: nobody holds their locks."""
    for folder in output_dir.glob(f"{_NAME}*"):
        with suppress(OatError, OSError), folder_lock(folder, "", name=_ALIVE):
            shutil.rmtree(folder)


def check_sharing(space: Workspace, config: Config, world: World, places: Sequence[Place]) -> list[Row]:
    """Every rank calls it: all see and write the same folder, and a lock of one keeps the others out."""
    seen = world.gather_objects(attempt(_see_and_write, space, world.rank))
    rows = trouble_rows("output_dir", seen, places)
    written = attempt(_find_all, space, places) if world.is_main and not rows else None
    if isinstance(world.gather_objects(written)[0], Trouble):
        rows += trouble_rows("output_dir", [written], places[:1]) if world.is_main else []
    with ExitStack() as stack:
        held = world.gather_objects(attempt(_hold, space, stack) if world.is_main else None)[0]
        kept_out = world.gather_objects(None if world.is_main else attempt(_is_kept_out, space))
    if isinstance(held, Trouble):
        rows.append(Row("output_dir", FAIL, held.found, held.remedy))
    elif not rows:
        outside = [place for place, kept in zip(places, kept_out, strict=True) if kept is False]
        if outside:
            rows.append(
                Row(
                    "output_dir",
                    WARN,
                    f"a lock of rank 0 does not hold on {ranks_text(outside)}: two starts of the run on different "
                    "nodes would not see each other",
                    "mount it with locks (Lustre: -o flock; NFS: without nolock), or never start a run twice",
                )
            )
    rows += _judge_holder(config) if world.is_main else []
    nodes = len(by_node(places))
    everywhere = f"the same folder on {nodes} nodes, " if nodes > 1 else ""
    return rows or [Row("output_dir", PASS, f"{config.output_dir}: {everywhere}it can be written to and locked")]


def _see_and_write(space: Workspace, rank: int) -> bool:
    if not _appears(space.folder / "token", space.token):
        raise OatError(
            f"output_dir={space.output_dir} is not the folder that rank 0 sees; it must lie on a file system that all "
            "nodes share, under the same path"
        )
    write_atomic(space.folder / f"rank-{rank}", space.token)
    return True


def _find_all(space: Workspace, places: Sequence[Place]) -> bool:
    unseen = [place for place in places if not _appears(space.folder / f"rank-{place.rank}", space.token)]
    if unseen:
        raise OatError(
            f"output_dir={space.output_dir}: what {ranks_text(unseen)} writes does not reach rank 0; it must lie on a "
            "file system that all nodes share"
        )
    return True


def _appears(path: Path, token: str) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        with suppress(FileNotFoundError):
            os.listdir(path.parent)  # makes a network file system look again  # noqa: PTH208
            return path.read_text() == token
        if time.monotonic() > deadline or not path.parent.parent.is_dir():
            return False
        time.sleep(0.2)


def _hold(space: Workspace, stack: ExitStack) -> bool:
    stack.enter_context(folder_lock(space.folder, "", name="trial"))
    return True


def _is_kept_out(space: Workspace) -> bool:
    try:
        with folder_lock(space.folder, "", name="trial"):
            return False
    except FolderBusyError:
        return True


def _judge_holder(config: Config) -> list[Row]:
    """Whether another process trains there. A lock file that is not there is not made."""
    folder = Path(config.output_dir)
    if not (folder / ".lock").exists():
        return []
    holder = lock_holder(folder)
    try:
        with folder_lock(folder, "busy"):
            return []
    except FolderBusyError:
        found = f"{folder}: another process trains in this folder{holder}"
        if config.job.take_over:
            return [
                Row("output_dir", WARN, f"{found}; job.take_over=true will fence it off", "make sure that is meant")
            ]
        return [Row("output_dir", FAIL, found, "wait for it, end it, or choose another output_dir")]
    except OatError as error:
        trouble = Trouble.of(error)
        return [Row("output_dir", FAIL, trouble.found, trouble.remedy)]


@dataclass(frozen=True)
class Room:
    """What is free where: `output` for checkpoints, `inodes` there (None: not counted), `cache` for fetched data."""

    output: int
    inodes: int | None
    cache_dir: str = ""
    cache: int = 0
    cache_needed: int = 0


def room(output: Path, cache_dir: Path | None, cache_needed: int) -> Room:
    """As this rank's node sees it. `cache_dir`: None where nothing is cached."""
    facts = os.statvfs(output)
    inodes = facts.f_favail if facts.f_files else None
    free = facts.f_bavail * facts.f_frsize
    if cache_dir is None:
        return Room(free, inodes)
    there = next(folder for folder in [cache_dir, *cache_dir.absolute().parents] if folder.exists())
    return Room(free, inodes, str(cache_dir), shutil.disk_usage(there).free, cache_needed)


def saved_bytes(run: Path) -> int:
    """Of the checkpoints that a run has already: the next ones take their place."""
    if not has_checkpoints(run):
        return 0
    return sum(path.stat().st_size for path in (run / "checkpoints").glob("step-*/*") if path.is_file())


def judge_room(
    found: Sequence[Room | Trouble], places: Sequence[Place], checkpoint: int | None, config: Config, saved: int
) -> list[Row]:
    """Whether it is enough.

    Args:
        checkpoint: bytes of one; None: not known.
        saved: bytes of those that are there.
    """
    rows = trouble_rows("free space", found, places)
    seen = [(one, place) for one, place in zip(found, places, strict=True) if not isinstance(one, Trouble)]
    if not seen:
        return rows
    least = min(one.output for one, _ in seen)
    if checkpoint is None:
        rows.append(
            Row("free space", WARN, f"{bytes_text(least)}; how much a checkpoint needs is not known", "see above")
        )
    else:
        rows += _judge_output(least, checkpoint, config, saved)
    inodes = [one.inodes for one, _ in seen if one.inodes is not None]
    needed = (config.checkpoint.keep + 2) * (len(places) + _INODES)
    if inodes and min(inodes) < max(needed, _FEW_INODES):
        status = FAIL if min(inodes) < needed else WARN
        rows.append(
            Row("inodes", status, f"{min(inodes):,} more files fit into output_dir", "remove files, or move output_dir")
        )
    for one, place in seen:
        if one.cache_needed > one.cache:
            rows.append(
                Row(
                    "cache",
                    FAIL,
                    f"{one.cache_dir} on {place.node} has {bytes_text(one.cache)} free, the data needs "
                    f"{bytes_text(one.cache_needed)}",
                    "set data.cache_dir to a larger disk, or data.cache_gb to less with data.shuffle_shards",
                )
            )
            break
    else:
        first = seen[0][0]
        if first.cache_needed:
            free = min(one.cache for one, _ in seen)
            text = f"{first.cache_dir}: {bytes_text(free)} free for {bytes_text(first.cache_needed)} of data"
            rows.append(Row("cache", PASS, text))
    return rows


def _judge_output(free: int, checkpoint: int, config: Config, saved: int) -> list[Row]:
    count = config.checkpoint.keep + 2
    needed = max(count * checkpoint - saved, checkpoint)
    found = (
        f"{bytes_text(free)} in output_dir; {count} checkpoints of {bytes_text(checkpoint)} (checkpoint.keep + 2) need "
        f"{bytes_text(count * checkpoint)}"
    )
    if saved:
        found += f", of which {bytes_text(saved)} are there"
    if free < needed:
        return [Row("free space", FAIL, found, "make room, choose another output_dir, or lower checkpoint.keep")]
    if free < 2 * needed:
        return [Row("free space", WARN, found, "little is left for others; a full disk would stop the run at a save")]
    return [Row("free space", PASS, found)]
