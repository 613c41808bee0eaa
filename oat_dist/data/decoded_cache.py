"""Decoded images of one split, kept from the first time each is read: in memory, or in a file that is mapped.

Where the pipeline gives the same image in every epoch (squash), that image is kept and a batch is one gather of rows.
Where the crop is drawn anew (random_resized_crop), the whole decoded image is kept and the crop is cut from it.

On disk all ranks of a machine, and later runs on the same data, share one file per split and recipe: a header, one
byte a sample that says "filled", the pixels. Its space is allocated when it is made, so that a full disk is an error at
the start and no SIGBUS later. A byte is set after its pixels (x86 shows other processes stores in their order); only a
crash of the machine could keep the one without the other, so a file that is not marked complete serves until the next
boot and is then begun anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil

from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError, DataError

__all__ = ["DECODED_CACHES", "DecodedCache", "open_decoded_cache"]

DECODED_CACHES = ("none", "ram", "disk")
_HEADER = 4096
_CGROUP = Path("/sys/fs/cgroup")
_FORMAT = "oat-dist-decoded-2"


class DecodedCache:
    """Pixels by sample id. Used from several threads: two that fill one slot write the same bytes.

    Args:
        filled_N: uint8, 1 for each sample whose pixels are there.
        pixels: flat uint8 buffer.
        starts_N: where each sample's pixels begin, and at N where the last ones end; None: all are `fixed` squares.
        sizes: widths_N and heights_N, with `starts_N`.
        fixed: pixels a side of every image, without `starts_N`.
    """

    def __init__(
        self,
        filled_N: np.ndarray,
        pixels: np.ndarray,
        fixed: int | None,
        starts_N: np.ndarray | None = None,
        sizes: tuple[np.ndarray, np.ndarray] | None = None,
        file: _File | None = None,
    ) -> None:
        self.filled_N, self._pixels, self._file = filled_N, pixels, file
        self._starts_N, self._sizes = starts_N, sizes
        self.final = fixed is not None
        self._squares_NHWC = pixels.reshape(len(filled_N), fixed, fixed, 3) if fixed is not None else None

    def take(self, ids_B: np.ndarray, images_BHWC: np.ndarray) -> np.ndarray:
        """Copy the final images that are there into their slots; which ones, (B,) bool."""
        assert self._squares_NHWC is not None
        have_B = self.filled_N[ids_B] != 0
        if have_B.all():
            np.take(self._squares_NHWC, ids_B, axis=0, out=images_BHWC, mode="clip")
        elif have_B.any():
            images_BHWC[have_B] = self._squares_NHWC[ids_B[have_B]]
        return have_B

    def get(self, sample_id: int) -> np.ndarray | None:
        """One image (H, W, 3), not to be written to; None if it is not there."""
        return self._slot(sample_id) if self.filled_N[sample_id] else None

    def put(self, sample_id: int, image_HWC: np.ndarray) -> None:
        """Keep one image. One of another size than the index says is not kept: the decoder judges it each time."""
        slot_HWC = self._slot(sample_id)
        if slot_HWC.shape == image_HWC.shape:
            slot_HWC[:] = image_HWC
            self.filled_N[sample_id] = 1

    def _slot(self, sample_id: int) -> np.ndarray:
        if self._squares_NHWC is not None:
            return self._squares_NHWC[sample_id]
        assert self._starts_N is not None and self._sizes is not None
        pixels = self._pixels[int(self._starts_N[sample_id]) : int(self._starts_N[sample_id + 1])]
        return pixels.reshape(int(self._sizes[1][sample_id]), int(self._sizes[0][sample_id]), 3)

    @property
    def complete(self) -> bool:
        return bool(self.filled_N.all())

    @property
    def nbytes(self) -> int:
        return self.filled_N.nbytes + self._pixels.nbytes

    def keep(self) -> None:
        """Mark a file on disk that is complete: it serves after a reboot too."""
        if self._file is not None and self.complete:
            self._file.mark_complete()


def open_decoded_cache(
    kind: str,
    shards: ShardSet,
    pipeline: ImagePipeline,
    folder: Path | None = None,
    processes: int = 1,
    reserved: int = 0,
) -> DecodedCache | None:
    """Make or open the cache of one split.

    Args:
        kind: one of `DECODED_CACHES`.
        pipeline: what is done to each image: its results are kept, or whole images where it draws a crop.
        folder: with "disk": where the file lies.
        processes: of this run on this machine; with "ram" each has a cache of its own.
        reserved: bytes that this process has promised to another cache and not used yet.

    Raises:
        ConfigError: more than the free memory, or the disk is too small.
        DataError: the folder cannot be written.
    """
    if kind == "none":
        return None
    number, fixed = shards.num_samples, pipeline.size if pipeline.deterministic else None
    starts_N, sizes = None, None
    if fixed is None:
        starts_N = np.zeros(number + 1, dtype=np.uint64)
        sizes = shards.index.width, shards.index.height
        np.cumsum(3 * sizes[0].astype(np.uint64) * sizes[1], out=starts_N[1:])
        total = int(starts_N[-1])
    else:
        total = number * fixed * fixed * 3
    if kind == "ram":
        _refuse_beyond_memory(number + total, reserved, processes, shards)
        memory = mmap.mmap(-1, max(number + total, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return DecodedCache(*_views(memory, 0, number), fixed, starts_N, sizes)
    assert folder is not None
    # Other versions of a decoder may give other pixels.
    facts: dict[str, object] = {"digest": shards.digest, "recipe": pipeline.recipe, "decoders": _decoders()}
    file = _File(folder / f"{shards.digest[:24]}-{pipeline.recipe}.decoded", number, total, facts)
    return DecodedCache(*_views(file.memory, _HEADER, number), fixed, starts_N, sizes, file)


def _decoders() -> dict[str, str]:
    found = {}
    for name in ("pillow", "simplejpeg", "opencv-python-headless", "opencv-python"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _views(memory: mmap.mmap, start: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    buffer = np.frombuffer(memory, dtype=np.uint8)
    return buffer[start : start + number], buffer[start + number :]


def _refuse_beyond_memory(size: int, reserved: int, processes: int, shards: ShardSet) -> None:
    free = _free_memory() - reserved * processes
    if size * processes > 0.9 * free:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"data.decoded_cache=ram needs {size / 2**30:.1f} GiB{each} to hold {shards.where}, and "
            f"{free / 2**30:.1f} GiB are free here; use data.decoded_cache=disk, pack with --short-side, or none"
        )


def _free_memory() -> int:
    """Bytes free on this machine, or left to this container or job."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


class _File:
    """The mapped file: a header of JSON, the bytes that say "filled", the pixels."""

    def __init__(self, path: Path, number: int, total: int, facts: dict[str, object]) -> None:
        self._facts = {"format": _FORMAT, "samples": number, "bytes": total, **facts}
        size = _HEADER + number + total
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                descriptor = self._open(path, size)
            try:
                self.memory = mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ConfigError(
                    f"data.decoded_cache=disk needs {size / 2**30:.1f} GiB in {path.parent}, and the disk has not that "
                    "much; use another data.cache_dir, pack with --short-side, or data.decoded_cache=none"
                ) from error
            raise DataError(f"{path}: cannot be written ({error.strerror}); use another data.cache_dir") from error

    def _open(self, path: Path, size: int) -> int:
        """The file's descriptor: the one that is there if it is of use, else a new one under its name."""
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(descriptor).st_size == size and self._usable(os.pread(descriptor, _HEADER, 0)):
                return descriptor
            os.close(descriptor)
        fresh = path.with_suffix(".new")  # left by a killed process: only the holder of the lock gets here
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)
            os.pwrite(descriptor, self._header(complete=False), 0)
            fresh.replace(path)
        except BaseException:
            os.close(descriptor)
            fresh.unlink(missing_ok=True)
            raise
        return descriptor

    def _header(self, *, complete: bool) -> bytes:
        return json.dumps({**self._facts, "boot": _boot(), "complete": complete}).encode().ljust(_HEADER)

    def _usable(self, header: bytes) -> bool:
        try:
            found = json.loads(header)
            boot, complete = found.pop("boot"), found.pop("complete")
        except (ValueError, KeyError, AttributeError):
            return False
        return bool(found == self._facts and (complete is True or boot == _boot()))

    def mark_complete(self) -> None:
        if json.loads(self.memory[:_HEADER])["complete"] is not True:
            self.memory.flush()
            self.memory[:_HEADER] = self._header(complete=True)
            self.memory.flush(0, _HEADER)


def _boot() -> str:
    """Which start of this machine this is; where the system does not say, no partial file outlives its process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
