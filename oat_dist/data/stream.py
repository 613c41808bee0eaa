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
import os
import random
import re
import select
import signal
import subprocess
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch
import webdataset
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from oat_dist.batch import Batch, Window
from oat_dist.data.hashing import keyed_hash_int
from oat_dist.data.images.decode import ImageError
from oat_dist.data.images.draws import STREAM
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.plan import Layout
from oat_dist.data.remote.fetch import shown
from oat_dist.errors import DataError

__all__ = ["StreamLoader", "StreamSet"]

_IMAGES = "jpg;jpeg;png;webp;ppm;bmp"
_LOOK_S = 0.2  # how often a reader that waits for a command looks whether it should end
_LEAVE_S = 1.0  # how long the end of a run waits for that reader


class _StoppedError(Exception):
    """Nobody wants the samples any more."""


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

    def describe(self, sample_id: int | str) -> str:
        """In words: a sample by its number, or by the tar and key under which `StreamBuilder.bad` lists it."""
        return sample_id if isinstance(sample_id, str) else f"sample {sample_id} of the stream"


@dataclass
class StreamBuilder:
    """Turns raw samples into a `Batch`. Called from several threads.

    Args:
        shards: what is streamed.
        pipeline: what is done to each image.
        image_key: extension of the image in a sample, several separated by ";"; null: any image.
        label_key: extension of the label; ``json:a.b`` for a value inside a JSON member.
        on_bad, max_bad, pin_memory: as of `BatchBuilder`; a bad sample is masked and listed by its tar and key,
            so one that comes again counts once.
    """

    shards: StreamSet
    pipeline: ImagePipeline
    image_key: str | None
    label_key: str
    on_bad: str = "stop"
    max_bad: int = 0
    pin_memory: bool = False
    bad: dict[str, str] = field(default_factory=dict)

    def build(self, samples: list[tuple[int, dict[str, Any]]], epoch: int) -> Batch:
        size = self.pipeline.size
        images_BHWC = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        view_BHWC = images_BHWC.numpy()
        ids_B = np.array([number for number, _ in samples], dtype=np.int64)
        labels_B, valid_B = np.zeros(len(samples), dtype=np.int64), np.ones(len(samples), dtype=bool)
        for slot, (_, sample) in enumerate(samples):
            labels_B[slot] = self._label(sample)
            try:
                view_BHWC[slot] = self.pipeline.read_whole(self._image(sample), int(ids_B[slot]), epoch)
            except ImageError as error:
                view_BHWC[slot] = 0
                valid_B[slot] = False
                self._refuse_or_record(_where(sample), str(error))
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
        raise DataError(
            f"{_where(sample)}: has no image under {self.image_key or _IMAGES}, only {_members(sample)}; set "
            "data.stream.image_key"
        )

    def _label(self, sample: dict[str, Any]) -> int:
        member, _, path = self.label_key.partition(":")
        try:
            label = _whole(_inside(sample[member], path) if path else sample[member])
        except (KeyError, IndexError, ValueError, TypeError) as error:
            why = f"there is no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{_where(sample)}: no label under data.stream.label_key={self.label_key} ({why}); the sample has "
                f"{_members(sample)}; labels are whole numbers in a member such as cls, or json:key.path"
            ) from error
        if not 0 <= label < len(self.shards.classes):
            raise DataError(
                f"{_where(sample)}: label {label} is out of range for {len(self.shards.classes)} classes; mend the "
                "labels or data.stream.classes"
            )
        return label

    def _refuse_or_record(self, where: str, why: str) -> None:
        if self.on_bad == "stop":
            raise DataError(f"{where}: {why}; this image cannot be decoded: mend it, or train with data.on_bad=skip")
        self.bad[where] = why
        if len(self.bad) > self.max_bad:
            raise DataError(f"{where}: {why}; that is more undecodable images than data.max_bad={self.max_bad} allows")


def _where(sample: dict[str, Any]) -> str:
    return f"{shown(str(sample.get('__url__')))}: {sample.get('__key__')}"


def _members(sample: dict[str, Any]) -> str:
    return ", ".join(sorted(key for key in sample if not key.startswith("__")))


def _inside(document: bytes, path: str) -> Any:
    value = json.loads(document)
    for part in path.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    return value


def _whole(value: Any) -> int:
    """A label as it stands there: never rounded, and true is not 1."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
        found = repr(text)
        raise ValueError(f"{found if len(found) <= 40 else found[:40] + '...'} is no whole number")
    return int(text)


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
        ready: SimpleQueue[Future[Batch]] = SimpleQueue()
        room, stop = Semaphore(self.prefetch + 1), Event()
        pool = ThreadPoolExecutor(self.workers, "oat-loader")
        # One thread reads, so that the order is one; the others decode. A read may never end (a stalled command), and
        # the interpreter waits for no daemon.
        arguments = (range(first_step, last_step), pool, ready, room, stop)
        feeder = Thread(target=self._feed, args=arguments, name="oat-stream", daemon=True)
        feeder.start()
        try:
            for step in range(first_step, last_step):
                batches = []
                for _ in self._sizes(step):
                    batches.append(ready.get().result())
                    room.release()
                yield self._window(step, tuple(batches))
        finally:
            stop.set()
            room.release()
            feeder.join(_LEAVE_S)
            pool.shutdown(cancel_futures=True)

    def _feed(
        self, steps: range, pool: ThreadPoolExecutor, ready: SimpleQueue[Future[Batch]], room: Semaphore, stop: Event
    ) -> None:
        """Read every micro-batch in turn and have it decoded; an error comes in the place of its batch."""
        try:
            with contextlib.closing(self._samples(steps.start, stop)) as samples:
                for step in steps:
                    for size in self._sizes(step):
                        room.acquire()
                        taken = list(itertools.islice(samples, size))
                        if stop.is_set():
                            return
                        ready.put(pool.submit(self._build, taken, step // self.steps_per_epoch))
        except Exception as error:
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            ready.put(failed)

    def _build(self, samples: list[tuple[int, dict[str, Any]]], epoch: int) -> Batch:
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

    def _samples(self, first_step: int, stop: Event) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Numbered raw samples. A run that goes on draws others than those it began with."""
        seed = keyed_hash_int(first_step, self.seed, self.rank, STREAM)
        tars = _Tars(self.urls, stop, self.urls)
        try:
            shards = webdataset.ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
            tars.patience = max(100, 20 * len(shards.urls))
            steps = [shards, tars.opened, tar_file_expander, group_by_keys, tars.counted]
            if self.shuffle > 1:
                steps.append(webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=random.Random(seed)))
            yield from zip(itertools.count(first_step << 32), webdataset.DataPipeline(*steps).iterator(), strict=False)
        except (DataError, _StoppedError):
            raise
        except Exception as error:  # webdataset and what it opens raise whatever comes up
            at = "" if tars.url == self.urls else f"{shown(tars.url)}: "
            raise DataError(f"{shown(self.urls)}: the stream cannot be read ({at}{_reason(error)})") from error
        finally:
            tars.close()


@dataclass
class _Tars:
    """Opens tar after tar for webdataset, one at a time; ends when told to, and when no tar has a sample.

    Args:
        urls: the pattern, for messages.
        stop: set by another thread to end soon.
        patience: how many tars in a row may hold no sample.
    """

    urls: str
    stop: Event
    url: str  # of the tar being read
    patience: int = 100
    barren: int = 0
    stream: BinaryIO | _Output | None = None

    def opened(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            if self.stop.is_set():
                raise _StoppedError
            if self.barren == self.patience:
                raise DataError(
                    f"{shown(self.urls)}: {self.barren} tars in a row hold no sample; a sample is files of one name "
                    "and several extensions, such as 0001.jpg and 0001.cls: check data.stream.urls"
                )
            self.url, self.barren = shard["url"], self.barren + 1
            stream = gopen(self.url)
            self.stream = _Output(stream, self.stop) if isinstance(stream, Pipe) else stream
            yield {"url": self.url, "stream": self.stream}
            self.stream.close()

    def counted(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            if self.stop.is_set():
                raise _StoppedError
            self.barren = 0
            yield sample

    def close(self) -> None:
        """Let go of a tar that is not read to its end; webdataset would leave it open."""
        if isinstance(self.stream, _Output):
            self.stream.abandon()
        elif self.stream is not None:
            self.stream.close()


class _Output:
    """What a command writes. Unlike webdataset's `Pipe`, waiting for it ends when `stop` is set."""

    def __init__(self, pipe: Pipe, stop: Event) -> None:
        self.pipe, self.stop = pipe, stop
        self.poll = select.poll()
        self.poll.register(pipe.stream, select.POLLIN)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end.

        Raises:
            OSError: the command failed.
        """
        while not self.poll.poll(_LOOK_S * 1000):
            self._look()
        self._look()
        data = os.read(self.pipe.stream.fileno(), size)
        if not data:
            self._wait()
        return data

    def close(self) -> None:
        """The tar has ended, and so should the command; OSError: it failed."""
        self.pipe.stream.close()
        self._wait()

    def abandon(self) -> None:
        """End the command and what it started (a shell has children); how is of no interest."""
        if self.pipe.proc.poll() is None:  # else its number may be another's by now
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.pipe.proc.pid).children(recursive=True):
                    child.kill()
            self.pipe.proc.kill()
        self.pipe.stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.pipe.proc.wait(_LEAVE_S)

    def _wait(self) -> None:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.pipe.proc.wait(_LOOK_S)
                break
            self._look()
        if status not in (*self.pipe.ignore_status, -signal.SIGPIPE):
            raise OSError(f"the command ended with status {status}")

    def _look(self) -> None:
        if self.stop.is_set():
            raise _StoppedError


def _reason(error: Exception) -> str:
    """What happened, without the objects and URLs that webdataset adds to the arguments of errors."""
    text = error.strerror if isinstance(error, OSError) and error.errno else str(error.args[0] if error.args else "")
    return shown((text or "").partition("\n")[0].partition(" @ ")[0]) or type(error).__name__
