"""From plan to batches.

What happens to a sample:
1. `Layout` and `EpochOrder` say that it belongs to this rank's part of a micro-batch.
2. A thread reads its bytes at (shard, offset), decodes and crops them into its slot of one uint8 buffer
   (`BatchBuilder`), or finds the pixels in the cache of decoded images.
3. The batch is augmented as a whole, each sample by its own hash of (seed, epoch, id).
4. The micro-batches of one optimizer step come out together as a `Window`, in order, a few ahead of need.

The loader shards by itself: it is never given to Accelerate.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from oat_dist.batch import Batch, Window
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.mixing import Mixing
from oat_dist.data.plan import EpochOrder, Layout, Part, fingerprint
from oat_dist.data.windows import ShardWindows

__all__ = ["TrainLoader", "evaluation_batches"]

# Without windows of shards, a remote one is fetched when so many samples are still to come before its first.
ANNOUNCED = 4096


@dataclass
class TrainLoader:
    """Windows of one rank from any position on.

    Args:
        builder: makes the batches.
        layout: how global batches are dealt.
        rank: this rank.
        seed: of the order.
        workers: decoding threads.
        prefetch: micro-batches decoded ahead of need.
        shard_windows: shuffle within windows of shards instead of over the whole set; None: over the whole set.
        mixing: mixup or cutmix; None: neither.
        mix_steps: only the first so many steps of the run are mixed, those of the cross-entropy phase.
    """

    builder: BatchBuilder
    layout: Layout
    rank: int
    seed: int
    workers: int = 2
    prefetch: int = 8
    shard_windows: ShardWindows | None = None
    mixing: Mixing | None = None
    mix_steps: int = 0

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.layout.steps(self.builder.shards.num_samples)

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.builder.shards.num_samples, self.seed, epoch, self.shard_windows)

    def window_plan(self, step: int) -> tuple[int, int, int, list[Part]]:
        """(epoch, first position, samples, this rank's parts) of global step `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start, stop = self.layout.batch_range(step_in_epoch, self.builder.shards.num_samples)
        return epoch, start, stop - start, [parts[self.rank] for parts in self.layout.deal(stop - start)]

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The windows of global steps [first_step, last_step), in order, across epochs."""
        jobs = ((step, number) for step in range(first_step, last_step) for number in self._micro_batches(step))
        pending: deque[Future[tuple[Batch, int]]] = deque()
        ahead = max(self.prefetch, self.workers - 1)  # so that no thread is idle
        announced = self._announcements(first_step, last_step)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="oat-loader")
        try:
            for step in range(first_step, last_step):
                next(announced, None)
                built = []
                for _ in self._micro_batches(step):
                    for job in itertools.islice(jobs, ahead + 1 - len(pending)):
                        pending.append(pool.submit(self._build, *job))
                    built.append(pending.popleft().result())
                yield self._window(step, built)
        finally:
            _end(pool, self.builder)

    def _announcements(self, first_step: int, last_step: int) -> Iterator[None]:
        """Tell the reader which remote shards come up; once a step. Nothing to do where all are here."""
        reader, shards = self.builder.reader, self.builder.shards
        if not shards.remote_shards():
            return
        steps_ahead = max(ANNOUNCED // self.layout.batch_size, 1)
        announced = first_step
        for step in range(first_step, last_step):
            if self.shard_windows is not None:
                epoch, start, _, _ = self.window_plan(step)
                reader.prefetch_shards(self.shard_windows.upcoming(self.seed, epoch, start))
            while self.shard_windows is None and announced < min(step + steps_ahead, last_step):
                for number in self._micro_batches(announced):
                    reader.prefetch(self._ids(announced, number)[2])
                announced += 1
            yield

    def _micro_batches(self, step: int) -> range:
        return range(len(self.window_plan(step)[3]))

    def _ids(self, step: int, number: int) -> tuple[int, int, np.ndarray]:
        """(epoch, position of the first one in it, ids) of one micro-batch of this rank."""
        epoch, start, _, parts = self.window_plan(step)
        part = parts[number]
        return epoch, start + part.start, self.order(epoch).ids(start + part.start, start + part.stop)

    def _build(self, step: int, number: int) -> tuple[Batch, int]:
        """A micro-batch of this rank, and its share of the fingerprint."""
        epoch, start, ids_B = self._ids(step, number)
        if len(ids_B) == 0:
            return self.builder.stand_in(), 0
        batch = self.builder.build(ids_B, epoch)
        if self.mixing is not None and step < self.mix_steps:
            step_in_epoch, size = step % self.steps_per_epoch, self.builder.pipeline.size
            mix = self.mixing.of(epoch, step_in_epoch, size, batch.every_valid().numpy())
            batch = dataclasses.replace(batch, mix=mix)
        return batch, fingerprint(epoch, start, ids_B, self.builder.shards.digest)

    def _window(self, step: int, built: list[tuple[Batch, int]]) -> Window:
        epoch, _, count, _ = self.window_plan(step)
        return Window(
            batches=tuple(batch for batch, _ in built),
            num_samples=count,
            num_valid=sum(batch.num_valid for batch, _ in built),
            fingerprint=sum(share for _, share in built) % 2**64,
            epoch=epoch,
            step_in_epoch=step % self.steps_per_epoch,
        )


def evaluation_batches(
    builder: BatchBuilder, rank: int, world: int, batch_size: int, workers: int = 2
) -> Iterator[Batch]:
    """Every sample of the split once over all ranks, in stored id order.

    All ranks get the same number of batches: engines that shard the weights need every rank in every forward pass.
    """
    total = builder.shards.num_samples
    start, stop = rank * total // world, (rank + 1) * total // world
    steps = -(-max((r + 1) * total // world - r * total // world for r in range(world)) // batch_size)

    def ids(step: int) -> np.ndarray:
        first = min(start + step * batch_size, stop)
        return np.arange(first, min(first + batch_size, stop))

    def build(step: int) -> Batch:
        ids_B = ids(step)
        return builder.build(ids_B) if len(ids_B) else builder.stand_in()

    announcements = iter(range(steps if builder.shards.remote_shards() else 0))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="oat-evaluation")
    try:
        pending: deque[Future[Batch]] = deque()
        upcoming = iter(range(steps))
        for done in range(steps):
            for step in itertools.islice(announcements, max(ANNOUNCED // batch_size, 1) if done == 0 else 1):
                builder.reader.prefetch(ids(step))
            for step in itertools.islice(upcoming, workers + 1 - len(pending)):
                pending.append(pool.submit(build, step))
            yield pending.popleft().result()
    finally:
        _end(pool, builder)


def _end(pool: ThreadPoolExecutor, builder: BatchBuilder) -> None:
    """Let the threads end soon, also those that wait for a remote shard."""
    pool.shutdown(wait=False, cancel_futures=True)
    builder.reader.cancel_reads()
    pool.shutdown(wait=True)
