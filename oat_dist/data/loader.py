"""From plan to batches.

What happens to a sample:
1. `Layout` and `EpochOrder` say that it belongs to this rank's part of a micro-batch.
2. A thread reads its bytes at (shard, offset) and decodes them.
3. It is squashed to the input size, mirrored if its own hash says so, and written to its slot of one uint8 buffer.
4. The micro-batches of one optimizer step come out together as a `Window`, in order, a few ahead of need.

A sample that cannot be decoded stops the run, or keeps its slot masked (``valid=False``), within a budget; the other
ranks and the order are not affected. The loader shards by itself: it is never given to Accelerate.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from oat_dist.batch import Batch, Window
from oat_dist.data.decode import ImageError, decode_rgb
from oat_dist.data.index import ShardSet
from oat_dist.data.plan import EpochOrder, Layout, Part, fingerprint
from oat_dist.data.storage import ShardReader
from oat_dist.data.transforms import flips, squash
from oat_dist.errors import DataError

__all__ = ["ON_BAD", "BatchBuilder", "TrainLoader", "evaluation_batches"]

ON_BAD = ("stop", "skip")


class BatchBuilder:
    """Turns sample ids into a `Batch`. Called from several threads.

    Args:
        shards: the opened split.
        image_size: S; images come out (S, S, 3).
        on_bad: "stop" raises at the first undecodable image; "skip" masks up to `max_bad` different ones.
        pin_memory: whether buffers are page-locked, for copies to a GPU that do not wait.
    """

    def __init__(
        self,
        shards: ShardSet,
        image_size: int,
        *,
        on_bad: str = "stop",
        max_bad: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.shards = shards
        self.image_size = image_size
        self.on_bad = on_bad
        self.max_bad = max_bad
        self.pin_memory = pin_memory
        self.bad: dict[int, str] = {}  # sample id -> why
        self._reader = ShardReader(shards)

    def build(self, ids_B: np.ndarray, mirrored_B: np.ndarray | None = None) -> Batch:
        """Read, decode and place the samples of one micro-batch, in order."""
        size = self.image_size
        images_BHWC = torch.empty((len(ids_B), size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        view_BHWC = images_BHWC.numpy()
        valid_B = np.ones(len(ids_B), dtype=bool)
        for slot, sample_id in enumerate(ids_B.tolist()):
            try:
                image_HWC = squash(decode_rgb(self._reader.read(sample_id)), size)
            except ImageError as error:
                self._refuse_or_record(sample_id, str(error))
                valid_B[slot] = False
                continue
            view_BHWC[slot] = image_HWC[:, ::-1] if mirrored_B is not None and mirrored_B[slot] else image_HWC
        if not valid_B.all():
            # BatchNorm sees every slot: a copy of a good neighbour does it less harm than grey.
            view_BHWC[~valid_B] = view_BHWC[valid_B][0] if valid_B.any() else 0
        return Batch(
            images_BHWC,
            torch.from_numpy(self.shards.index.label[ids_B].astype(np.int64)),
            torch.from_numpy(ids_B.astype(np.int64)),
            None if valid_B.all() else torch.from_numpy(valid_B),
        )

    def stand_in(self) -> Batch:
        """One masked sample, for a rank that has none in this micro-batch but must keep in step."""
        size = self.image_size
        zero_1 = torch.zeros(1, dtype=torch.int64)
        image_1HWC = torch.zeros((1, size, size, 3), dtype=torch.uint8)
        return Batch(image_1HWC, zero_1, zero_1, torch.zeros(1, dtype=torch.bool), empty=True)

    def close(self) -> None:
        self._reader.close()

    def _refuse_or_record(self, sample_id: int, reason: str) -> None:
        where = f"{self.shards.describe(sample_id)} cannot be decoded: {reason}"
        if self.on_bad == "stop":
            raise DataError(f"{where}; pack again without it (--on-bad skip), or train with data.on_bad=skip")
        self.bad[sample_id] = reason
        if len(self.bad) > self.max_bad:
            raise DataError(
                f"{where}; these are more undecodable images than data.max_bad={self.max_bad} allows; "
                "run shards/verify.py on the data set"
            )


@dataclass
class TrainLoader:
    """Windows of one rank from any position on.

    Args:
        builder: makes the batches.
        layout: how global batches are dealt.
        rank: this rank.
        seed: of order and augmentation.
        augment: "none" or "flip".
        workers: decoding threads.
        prefetch: micro-batches decoded ahead of need.
    """

    builder: BatchBuilder
    layout: Layout
    rank: int
    seed: int
    augment: str = "none"
    workers: int = 2
    prefetch: int = 8

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.layout.steps(self.builder.shards.num_samples)

    def window_plan(self, step: int) -> tuple[int, int, int, list[Part]]:
        """(epoch, first position, samples, this rank's parts) of global step `step`."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start, stop = self.layout.batch_range(step_in_epoch, self.builder.shards.num_samples)
        return epoch, start, stop - start, [parts[self.rank] for parts in self.layout.deal(stop - start)]

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The windows of global steps [first_step, last_step), in order, across epochs."""
        jobs = ((step, number) for step in range(first_step, last_step) for number in self._micro_batches(step))
        pending: deque[Future[Batch]] = deque()
        ahead = max(self.prefetch, self.workers - 1)  # so that no thread is idle
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="oat-loader")
        try:
            for step in range(first_step, last_step):
                batches = []
                for _ in self._micro_batches(step):
                    for job in itertools.islice(jobs, ahead + 1 - len(pending)):
                        pending.append(pool.submit(self._build, *job))
                    batches.append(pending.popleft().result())
                yield self._window(step, batches)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _micro_batches(self, step: int) -> range:
        return range(len(self.window_plan(step)[3]))

    def _ids(self, step: int, number: int) -> tuple[int, int, np.ndarray]:
        epoch, start, _, parts = self.window_plan(step)
        part = parts[number]
        order = EpochOrder(self.builder.shards.num_samples, self.seed, epoch)
        return epoch, start + part.start, order.ids(start + part.start, start + part.stop)

    def _build(self, step: int, number: int) -> Batch:
        epoch, _, ids_B = self._ids(step, number)
        if len(ids_B) == 0:
            return self.builder.stand_in()
        return self.builder.build(ids_B, flips(ids_B, self.seed, epoch) if self.augment == "flip" else None)

    def _window(self, step: int, batches: list[Batch]) -> Window:
        epoch, _, count, _ = self.window_plan(step)
        total = 0
        for number in range(len(batches)):
            _, start, ids_B = self._ids(step, number)
            total += fingerprint(epoch, start, ids_B, self.builder.shards.digest)
        return Window(
            batches=tuple(batches),
            num_samples=count,
            num_valid=sum(batch.num_valid for batch in batches),
            fingerprint=total % 2**64,
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

    def build(step: int) -> Batch:
        first = min(start + step * batch_size, stop)
        ids_B = np.arange(first, min(first + batch_size, stop))
        return builder.build(ids_B) if len(ids_B) else builder.stand_in()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="oat-evaluation")
    try:
        pending: deque[Future[Batch]] = deque()
        upcoming = iter(range(steps))
        for _ in range(steps):
            for step in itertools.islice(upcoming, workers + 1 - len(pending)):
                pending.append(pool.submit(build, step))
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
