"""CIFAR-10 in every form it is passed around in: the python pickles, the binary version, their archives, or JPEGs.

Both published versions hold the same pictures in the same order and are packed into the same bytes: PNGs (lossless)
named after batch and position, `data_batch_3/00042.png`. Pickles are read without running anything
(`plain_pickle`), archives in memory without making files, so that nothing in them can do harm.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from oat_dist.data.images.png import encode_png
from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.imagefolder import plan_imagefolder
from oat_dist.data.sources.plain_pickle import read_plain_pickle
from oat_dist.data.sources.splits import PackPlan, SplitRequest, chosen_splits, list_some
from oat_dist.errors import DataError

__all__ = ["HELP", "plan_cifar10"]

HELP = """\
INPUT is cifar-10-batches-py or cifar-10-batches-bin, the folder that holds it, the published .tar.gz itself,
or a folder of images train/<class>/* and test/<class>/*"""

_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
_PUBLISHED_RECORDS = 10_000
_PUBLISHED_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_LARGEST_FILE = 256 << 20  # a batch has 31 MB; nothing larger is taken into memory


@dataclass(frozen=True)
class _Version:
    """One of the two published versions."""

    folder: str
    suffix: str
    meta: str
    read_batch: Callable[[bytes, str], tuple[np.ndarray, np.ndarray]]
    read_classes: Callable[[bytes, str], list[str]]

    def names(self) -> list[str]:
        return [f"{batch}{self.suffix}" for batches in _BATCHES.values() for batch in batches]


class _Files:
    """The files of one version by name, in a folder or in memory."""

    def __init__(self, version: _Version, where: Path, contents: dict[str, bytes] | None = None) -> None:
        self.version, self.where, self._contents = version, where, contents

    def place(self, name: str) -> str:
        return str(self.where / name) if self._contents is None else f"{self.where}: {name}"

    def read(self, name: str) -> bytes | None:
        """None if it is not there."""
        if self._contents is not None:
            return self._contents.get(name)
        path = self.where / name
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > _LARGEST_FILE:
                raise DataError(f"{path}: too large for a batch of CIFAR-10; fetch the published archive")
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def plan_cifar10(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """The batches that the wanted splits need, in memory (3 KB an image); a folder of images as `imagefolder`.

    Raises:
        DataError: no batches at `input`, one that is missing, cut short, not of 32x32 images or has a label out of
            range, or a pickle that holds more than plain data; what `imagefolder` refuses.
    """
    path = Path(input)
    if path.is_file():
        files = _in_archive(path)
    elif path.is_dir():
        found = _in_folder(path)
        if found is None:
            plan = plan_imagefolder(input, splits=splits, seed=seed)
            if plan.classes != _CLASSES:
                raise DataError(
                    f"{path}: holds neither the published files of CIFAR-10 nor folders of its ten classes, but "
                    f"{', '.join(plan.classes[:3])}{', ...' * (len(plan.classes) > 3)}; use the source imagefolder"
                )
            return PackPlan("cifar10", plan.classes, plan.splits, plan.notes)
        files = found
    else:
        raise DataError(f"{path}: no such folder or archive; check the path")
    return _plan_batches(files, chosen_splits(path, _BATCHES, splits))


def _plan_batches(files: _Files, splits: list[str]) -> PackPlan:
    version = files.version
    notes: list[str] = []
    meta = files.read(version.meta)
    if meta is None:
        classes = _CLASSES
        notes.append(f"no {version.meta} there; took the published class names")
    else:
        classes = version.read_classes(meta, files.place(version.meta))
    planned: dict[str, list[Sample]] = {}
    other_sizes: list[str] = []
    other_content: list[str] = []
    for split in splits:
        contents = {batch: files.read(f"{batch}{version.suffix}") for batch in _BATCHES[split]}
        missing = [f"{batch}{version.suffix}" for batch, data in contents.items() if data is None]
        if missing:
            raise DataError(f"{files.where}: lacks {', '.join(missing)}; fetch the published archive again")
        planned[split] = []
        for batch, data in contents.items():
            assert data is not None
            images, labels = version.read_batch(data, files.place(f"{batch}{version.suffix}"))
            planned[split] += _samples(batch, images, labels, classes, files.place(f"{batch}{version.suffix}"))
            if len(labels) != _PUBLISHED_RECORDS:
                other_sizes.append(f"{batch} ({len(labels):,})")
            elif version is _PYTHON and hashlib.md5(data, usedforsecurity=False).hexdigest() != _PUBLISHED_MD5[batch]:
                other_content.append(batch)
    if other_sizes:
        notes.append(f"not of {_PUBLISHED_RECORDS:,} images as published: {list_some(other_sizes)}")
    if other_content:
        notes.append(f"not the published files, by their MD5: {list_some(other_content)}")
    return PackPlan("cifar10", classes, planned, notes)


def _samples(batch: str, images: np.ndarray, labels: np.ndarray, classes: list[str], where: str) -> list[Sample]:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        raise DataError(
            f"{where}: image {wrong[0]} has the label {labels[wrong[0]]}, out of range for {len(classes)} classes "
            f"(0 to {len(classes) - 1}); the file is damaged: fetch it again"
        )
    return [
        Sample(f"{batch}/{position:05d}.png", classes[label], functools.partial(_png, image))
        for position, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]


def _png(planes: np.ndarray) -> bytes:
    """PNG of one record: (3072,) uint8, red, green and blue one after the other."""
    return encode_png(planes.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0), compress=False)


def _read_pickled_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3072) uint8 and labels (n,) of one pickle."""
    content = _text_keys(data, where)
    images, labels = content.get("data"), content.get("labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        raise DataError(f"{where}: its 'data' is no array of 32x32 images (n, {_PIXELS}); fetch the published archive")
    numbers = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(numbers, list) or not all(type(number) is int and abs(number) < 2**31 for number in numbers):
        raise DataError(f"{where}: its 'labels' are no list of whole numbers; fetch the published archive")
    if len(numbers) != len(images):
        raise DataError(f"{where}: {len(images):,} images but {len(numbers):,} labels; fetch the published archive")
    return images, np.array(numbers, dtype=np.int64)


def _read_pickled_classes(data: bytes, where: str) -> list[str]:
    names = _text_keys(data, where).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{where}: has no list 'label_names'; fetch the published archive")
    return [name if isinstance(name, str) else name.decode("latin-1") for name in names]


def _text_keys(data: bytes, where: str) -> dict[str, Any]:
    content = read_plain_pickle(data, where)
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds no dictionary; this is no file of CIFAR-10")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _read_binary_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3072) uint8 and labels (n,) of one binary file: a label and the pixels, again and again."""
    if not data or len(data) % (1 + _PIXELS):
        raise DataError(
            f"{where}: {len(data):,} bytes are not a whole number of images of {1 + _PIXELS:,} bytes; "
            "the file is damaged or cut short: fetch it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_binary_classes(data: bytes, where: str) -> list[str]:
    try:
        names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        names = []
    if not names:
        raise DataError(f"{where}: is no list of class names; fetch the published archive")
    return names


_PYTHON = _Version("cifar-10-batches-py", "", "batches.meta", _read_pickled_batch, _read_pickled_classes)
_BINARY = _Version("cifar-10-batches-bin", ".bin", "batches.meta.txt", _read_binary_batch, _read_binary_classes)


def _in_folder(folder: Path) -> _Files | None:
    """The batches in `folder`, or in the one below it that bears the published name; None if there are none."""
    for version in (_PYTHON, _BINARY):
        for candidate in (folder, folder / version.folder):
            if any((candidate / name).is_file() for name in version.names()):
                return _Files(version, candidate)
    return None


def _in_archive(path: Path) -> _Files:
    """The batches in a tar archive, by the last part of their names; nothing is written."""
    known = {name for version in (_PYTHON, _BINARY) for name in (*version.names(), version.meta)}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if not member.isreg() or name not in known:
                    continue
                if name in contents:
                    raise DataError(f"{path}: holds two files {name!r}; fetch the published archive")
                if member.size > _LARGEST_FILE:
                    raise DataError(f"{path}: {name!r} is too large for a batch of CIFAR-10")
                file = archive.extractfile(member)
                assert file is not None
                contents[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); fetch it again") from error
    for version in (_PYTHON, _BINARY):
        if contents.keys() & set(version.names()):
            return _Files(version, path, contents)
    raise DataError(
        f"{path}: holds no batches of CIFAR-10 such as data_batch_1; an archive of images must be unpacked first"
    )
