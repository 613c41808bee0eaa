"""``data.mode: stream``: a thin pipeline of the webdataset library, for tars that cannot be indexed.

Endless or piped sources have no index, so nothing here is exact: every rank draws shards at random for itself (with
replacement, so no rank runs out), samples pass a shuffle buffer, and a resumed run goes on with other samples than
the undisturbed one. Batches, masks, anchors and steps are those of every run. Whatever can be read twice is better
indexed (``oat-dist index``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from oat_dist.batch import Batch, Window
from oat_dist.data.hashing import keyed_hash_int
from oat_dist.data.images.decode import ImageError
from oat_dist.data.images.draws import STREAM
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.plan import Layout
from oat_dist.errors import DataError

__all__ = ["StreamLoader", "StreamSet"]

_IMAGES = "jpg;jpeg;png;webp;ppm;bmp"


@dataclass(frozen=True)
class StreamSet:
    """What a run says of the data it streams, in place of a `ShardSet`.

    Attributes:
        where: the URLs, for messages.
        num_samples: what counts as an epoch.
    """

    where: str
    classes: list[str]
    num_samples: int
    digest: str = "stream"

    def __len__(self) -> int:
        return self.num_samples

    def describe(self, sample_id: int) -> str:
        return f"sample {sample_id} of the stream"


@dataclass
class StreamBuilder:
    """Turns raw samples into a `Batch`. Called from several threads.

    Args:
        shards: what is streamed.
        pipeline: what is done to each image.
        image_key: extension of the image in a sample, several separated by ";"; null: any image.
        label_key: extension of the label; ``json:a.b`` for a value inside a JSON member.
        on_bad, max_bad, pin_memory: as of `BatchBuilder`; a bad sample is masked and listed by its key.
    """

    shards: StreamSet
    pipeline: ImagePipeline
    image_key: str | None
    label_key: str
    on_bad: str = "stop"
    max_bad: int = 0
    pin_memory: bool = False
    bad: dict[int, str] = field(default_factory=dict)

    def build(self, samples: list[tuple[int, dict[str, Any]]], epoch: int) -> Batch:
        size = self.pipeline.size
        images_BHWC = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        view_BHWC = images_BHWC.numpy()
        ids_B = np.array([number for number, _ in samples], dtype=np.int64)
        labels_B, valid_B = np.zeros(len(samples), dtype=np.int64), np.ones(len(samples), dtype=bool)
        for slot, (number, sample) in enumerate(samples):
            labels_B[slot] = self._label(sample)
            try:
                view_BHWC[slot] = self.pipeline.read_whole(self._image(sample), int(ids_B[slot]), epoch)
            except ImageError as error:
                view_BHWC[slot] = 0
                valid_B[slot] = False
                self._refuse_or_record(number, f"{_where(sample)}: {error}")
        self.pipeline.finish(view_BHWC, ids_B, epoch)
        return Batch(
            images_BHWC,
            torch.from_numpy(labels_B),
            torch.from_numpy(ids_B),
            None if valid_B.all() else torch.from_numpy(valid_B),
        )

    def stand_in(self) -> Batch:
        size, zero_1 = self.pipeline.size, torch.zeros(1, dtype=torch.int64)
        image_1HWC = torch.zeros((1, size, size, 3), dtype=torch.uint8)
        return Batch(image_1HWC, zero_1, zero_1, torch.zeros(1, dtype=torch.bool), empty=True)

    def close(self) -> None:
        pass

    def _image(self, sample: dict[str, Any]) -> bytes:
        for key in (self.image_key or _IMAGES).split(";"):
            if key in sample:
                data: bytes = sample[key]
                return data
        there = ", ".join(sorted(key for key in sample if not key.startswith("__")))
        raise DataError(
            f"{_where(sample)}: has no image under {self.image_key or _IMAGES}, only {there}; set data.stream.image_key"
        )

    def _label(self, sample: dict[str, Any]) -> int:
        member, _, path = self.label_key.partition(":")
        try:
            value = sample[member]
            if path:
                value = json.loads(value)
                for part in path.split("."):
                    value = value[int(part) if isinstance(value, list) else part]
            label = int(value)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise DataError(
                f"{_where(sample)}: no label under data.stream.label_key={self.label_key} ({error!r}); labels are "
                "whole numbers in a member such as cls, or json:key.path"
            ) from error
        if not 0 <= label < len(self.shards.classes):
            raise DataError(
                f"{_where(sample)}: label {label} is out of range for {len(self.shards.classes)} classes; mend the "
                "labels or data.stream.classes"
            )
        return label

    def _refuse_or_record(self, number: int, what: str) -> None:
        if self.on_bad == "stop":
            raise DataError(f"{what}; this image cannot be decoded: mend it, or train with data.on_bad=skip")
        self.bad[number] = what
        if len(self.bad) > self.max_bad:
            raise DataError(f"{what}; these are more undecodable images than data.max_bad={self.max_bad} allows")


def _where(sample: dict[str, Any]) -> str:
    return f"{sample.get('__url__')}: {sample.get('__key__')}"


@dataclass
class StreamLoader:
    """Windows of one rank, without end.

    Args:
        builder: makes the batches.
        urls: one pattern of webdataset: paths or URLs with braces, or ``pipe:`` and a command.
        layout: how global batches are dealt.
        rank, seed: what this rank's own order is drawn from.
        shuffle: samples in the shuffle buffer.
        workers: decoding threads.
        prefetch: micro-batches decoded ahead of need.
    """

    builder: StreamBuilder
    urls: str
    layout: Layout
    rank: int
    seed: int
    shuffle: int = 1000
    workers: int = 2
    prefetch: int = 8

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.layout.steps(self.builder.shards.num_samples)

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The windows of global steps [first_step, last_step)."""
        samples = self._samples(first_step)
        jobs = ((step, size) for step in range(first_step, last_step) for size in self._sizes(step))
        pending: deque[Future[Batch]] = deque()
        # One thread reads, so that the order is one; the others decode.
        with ThreadPoolExecutor(1, "oat-stream") as feeder, ThreadPoolExecutor(self.workers, "oat-loader") as pool:
            try:
                for step in range(first_step, last_step):
                    batches = []
                    for _ in self._sizes(step):
                        for job_step, size in itertools.islice(jobs, self.prefetch + 1 - len(pending)):
                            read = feeder.submit(_taken, samples, size)
                            pending.append(pool.submit(self._build, read, job_step // self.steps_per_epoch))
                        batches.append(pending.popleft().result())
                    yield self._window(step, tuple(batches))
            finally:
                pool.shutdown(cancel_futures=True)
                feeder.shutdown(cancel_futures=True)
                samples.close()

    def _build(self, read: Future[list[tuple[int, dict[str, Any]]]], epoch: int) -> Batch:
        samples = read.result()
        return self.builder.build(samples, epoch) if samples else self.builder.stand_in()

    def _range(self, step: int) -> int:
        start, stop = self.layout.batch_range(step % self.steps_per_epoch, self.builder.shards.num_samples)
        return stop - start

    def _sizes(self, step: int) -> list[int]:
        return [len(parts[self.rank]) for parts in self.layout.deal(self._range(step))]

    def _window(self, step: int, batches: tuple[Batch, ...]) -> Window:
        return Window(
            batches=batches,
            num_samples=self._range(step),
            num_valid=sum(batch.num_valid for batch in batches),
            fingerprint=0,
            epoch=step // self.steps_per_epoch,
            step_in_epoch=step % self.steps_per_epoch,
        )

    def _samples(self, first_step: int) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Numbered raw samples. A run that goes on draws others than those it began with."""
        seed = keyed_hash_int(first_step, self.seed, self.rank, STREAM)
        shards = webdataset.ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        steps = [shards, url_opener, _closing, tar_file_expander, group_by_keys]
        if self.shuffle > 1:
            steps.append(webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=random.Random(seed)))
        samples = webdataset.DataPipeline(*steps).iterator()
        try:
            for number in itertools.count(first_step << 32):
                try:
                    sample = next(samples)
                except Exception as error:  # webdataset and what it opens raise whatever comes up
                    text = str(error).partition("\n")[0] or type(error).__name__
                    raise DataError(f"{self.urls}: the stream cannot be read ({text})") from error
                yield number, sample
        finally:
            samples.close()


def _taken(samples: Iterator[tuple[int, dict[str, Any]]], count: int) -> list[tuple[int, dict[str, Any]]]:
    return list(itertools.islice(samples, count))


def _closing(opened: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """webdataset leaves a tar open that is not read to its end."""
    for shard in opened:
        try:
            yield shard
        except GeneratorExit:  # closed early: how a command ended is of no interest then
            with contextlib.suppress(OSError):
                shard["stream"].close()
            raise
        shard["stream"].close()
