"""Whether every node sees the same shards, whole.

Each node is to verify every shard once: they are dealt over its ranks, and read by threads, while the ranks keep
telling each other how far they are. So nobody waits in a collective for longer than a moment, however large the set.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from oat_dist.config import Config
from oat_dist.data.index import ShardSet
from oat_dist.data.progress import show_progress
from oat_dist.data.remote.shard_cache import RemoteFile
from oat_dist.data.stream import StreamSet
from oat_dist.data_parts import open_splits
from oat_dist.distributed import World
from oat_dist.doctor.looks import Place, Trouble, attempt, by_node, differing, trouble_rows
from oat_dist.doctor.rows import FAIL, PASS, SKIP, WARN, Row, bytes_text
from oat_dist.files import sha256_file

__all__ = ["Opened", "check_bytes", "judge_sets", "open_sets"]

_TICK_SECONDS = 0.25
_STALLED_SECONDS = 600.0
_THREADS = 4
_SHOWN = 5


@dataclass(frozen=True)
class Opened:
    """The splits as one rank sees them; `train` is a stream where data.mode=stream."""

    train: ShardSet | StreamSet
    evaluation: ShardSet | None

    @property
    def sets(self) -> list[ShardSet]:
        return [one for one in (self.train, self.evaluation) if isinstance(one, ShardSet)]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(one.digest[:12] for one in self.sets)

    @property
    def remote_bytes(self) -> int:
        """Of shards that are still to be fetched."""
        return sum(file.size for one in self.sets for file in one.remote_shards() if not one.cache.holds(file))


def open_sets(config: Config) -> Opened:
    """Checks manifest, index, and presence and size of every local shard.

    Raises:
        DataError: as `open_split`.
    """
    return Opened(*open_splits(config.data))


def judge_sets(
    found: Sequence[tuple[str, ...] | Trouble], places: Sequence[Place], mine: Opened | Trouble
) -> list[Row]:
    """`found`: what each rank's splits call themselves; `mine`: those of this rank."""
    rows = trouble_rows("data", found, places)
    seen = [
        (" and ".join(one) or "a stream", place)
        for one, place in zip(found, places, strict=True)
        if not isinstance(one, Trouble)
    ]
    text = differing([name for name, _ in seen], [place for _, place in seen])
    if text:
        rows.append(
            Row("data", FAIL, f"not the same data everywhere: digests {text}", "copy one packed set to every node")
        )
    if rows or isinstance(mine, Trouble):
        return rows
    parts = [f"{one.manifest.split} {one.num_samples:,} samples in {len(one.manifest.shards):,}" for one in mine.sets]
    total = sum(shard.size for one in mine.sets for shard in one.manifest.shards)
    nodes = len(by_node(places))
    where = mine.sets[0].where if mine.sets else "a stream"
    same = f"; the same on {nodes} nodes" if nodes > 1 else ""
    return [Row("data", PASS, f"{where}: {', '.join(parts)} shards, {bytes_text(total)}{same}")]


class _Job(NamedTuple):
    shards: ShardSet
    number: int

    @property
    def size(self) -> int:
        return self.shards.manifest.shards[self.number].size


@dataclass
class _Progress:
    """Of one rank; its threads add to it."""

    read: int = 0
    fetched: int = 0
    problems: list[Trouble] = field(default_factory=list)
    moved: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)


def check_bytes(opened: Opened, world: World, places: Sequence[Place], *, quick: bool, shown: bool) -> list[Row]:
    """Verify every local shard once on each node, and fetch one of a remote set. Every rank calls it.

    Args:
        quick: the sizes, which opening has compared, are enough.
        shown: draw a progress bar.
    """
    if quick:
        return [Row("shards", SKIP, "present and of the right size; not read")]
    here = [place for place in places if place.node == places[world.rank].node]
    jobs, unknown = _dealt(opened, [place.rank for place in here].index(world.rank), len(here))
    progress = _Progress()
    running = _start(jobs, progress, max(1, min(_THREADS, len(os.sched_getaffinity(0)) // len(here))))
    total = sum(world.gather_objects(sum(job.size for job in jobs)))
    stalled: list[Trouble] = []
    with show_progress("verifying shards (MiB)", total >> 20, enabled=shown) as advance:
        before = 0
        while True:
            finished = not any(thread.is_alive() for thread in running)
            if not finished and not stalled and time.monotonic() - progress.moved > _STALLED_SECONDS:
                stalled.append(
                    Trouble(f"no shard could be read in {_STALLED_SECONDS / 60:.0f} minutes", "mend the file system")
                )
            told = world.gather_objects((progress.read, finished or bool(stalled)))
            done = sum(read for read, _ in told) >> 20
            advance(done - before)
            before = done
            if all(ended for _, ended in told):
                break
            time.sleep(_TICK_SECONDS)
    everything = world.gather_objects((progress.problems + stalled, progress.fetched))
    rows = _problem_rows([problems for problems, _ in everything], places)
    if unknown:
        rows.append(
            Row(
                "shards",
                WARN,
                f"{unknown:,} have no checksum in the manifest",
                "index the shards again: oat-dist index",
            )
        )
    return rows or [_good(opened, sum(fetched for _, fetched in everything), len(by_node(places)))]


def _dealt(opened: Opened, number: int, ranks: int) -> tuple[list[_Job], int]:
    """What rank `number` of the `ranks` of a node reads, and how many shards have no checksum."""
    local, remote, unknown = [], [], 0
    for shards in opened.sets:
        for shard in range(len(shards.manifest.shards)):
            place = shards.place(shard)
            if isinstance(place, RemoteFile):
                remote.append(_Job(shards, shard))
            elif shards.manifest.shards[shard].sha256:
                local.append(_Job(shards, shard))
            else:
                unknown += 1
    # All of a remote set may be more than a machine holds: one shard shows whether the way is free.
    return (local + remote[:1])[number::ranks], unknown


def _start(jobs: Sequence[_Job], progress: _Progress, count: int) -> list[threading.Thread]:
    waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            result = attempt(_verify, job)
            with progress.lock:
                progress.read += job.size
                progress.moved = time.monotonic()
                if isinstance(result, Trouble):
                    progress.problems.append(result)
                elif result:
                    progress.fetched += 1

    # Daemons: reading from a file system that is away cannot be interrupted.
    threads = [threading.Thread(target=work, name="oat-verify", daemon=True) for _ in range(min(count, len(jobs)))]
    for thread in threads:
        thread.start()
    return threads


def _verify(job: _Job) -> bool | Trouble:
    """Whether the shard was fetched; trouble if it is not what it should be."""
    place = job.shards.place(job.number)
    if isinstance(place, RemoteFile):
        os.close(job.shards.cache.open(place))  # verifies what it fetches
        return True
    assert isinstance(place, Path)
    if sha256_file(place) != job.shards.manifest.shards[job.number].sha256:
        return Trouble(f"{place}: its bytes have changed (SHA-256 differs)", "restore it or pack again")
    return False


def _problem_rows(problems: Sequence[Sequence[Trouble]], places: Sequence[Place]) -> list[Row]:
    """Each shard once, however many nodes it is damaged on."""
    by_trouble: dict[Trouble, set[str]] = {}
    for of_rank, place in zip(problems, places, strict=True):
        for trouble in of_rank:
            by_trouble.setdefault(trouble, set()).add(place.node)
    nodes = len(by_node(places))
    rows = []
    for trouble, where in list(by_trouble.items())[:_SHOWN]:
        on = f" [on {', '.join(sorted(where))}]" if 0 < len(where) < nodes else ""
        rows.append(Row("shards", FAIL, f"{trouble.found}{on}", trouble.remedy))
    if len(by_trouble) > _SHOWN:
        rows.append(Row("shards", FAIL, f"... and {len(by_trouble) - _SHOWN:,} more", "oat-dist verify lists all"))
    return rows


def _good(opened: Opened, fetched: int, nodes: int) -> Row:
    remote = sum(len(one.remote_shards()) for one in opened.sets)
    local = sum(len(one.manifest.shards) for one in opened.sets) - remote
    each = " on each node" if nodes > 1 else ""
    if local:
        return Row("shards", PASS, f"the checksum of every one is right, {local:,}{each}")
    if remote:
        return Row("shards", PASS, f"{remote:,} remote ones; one was fetched and is whole{each}")
    return Row("shards", SKIP, "a stream has no checksums")
