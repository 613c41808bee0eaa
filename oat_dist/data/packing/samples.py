"""The samples that a packer is given: what one is, in which order they are packed, and what their labels mean."""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from oat_dist.errors import DataError

__all__ = [
    "AnySample",
    "Sample",
    "class_names",
    "class_numbers",
    "order_of",
    "refuse_empty_class",
    "sample_key",
    "sample_keys",
    "seeded_hashes",
    "seeded_order",
    "sorted_samples",
]


class Sample(NamedTuple):
    """One image to pack: a name unique in its split, its class (name or number), its bytes or where from (a path)."""

    name: str
    label: int | str
    data: bytes | str | Path | Callable[[], bytes]


AnySample = Sample | tuple[str, int | str, bytes | str | Path | Callable[[], bytes]]


def seeded_order(items: Sequence[str], seed: int) -> list[int]:
    """Indices of `items` in a random order fixed by `seed`: by keyed hash, so no library can change it."""
    return order_of(seeded_hashes(items, seed)).tolist()


def seeded_hashes(items: Iterable[str], seed: int) -> np.ndarray:
    """(n, 2) uint64: what `seeded_order` sorts by, first half first."""
    digests = b"".join(hashlib.blake2b(f"{seed}:{item}".encode(), digest_size=16).digest() for item in items)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def order_of(hashes: np.ndarray) -> np.ndarray:
    """(n,) int64: indices in the order of `seeded_hashes`."""
    return np.lexsort((hashes[:, 1], hashes[:, 0]))


def sample_keys(ranks: range, total: int) -> Iterator[str]:
    """`sample_key` of each of these ranks."""
    digits = _key_digits(total)
    return (f"{rank:0{digits}d}" for rank in ranks)


def sample_key(rank: int, total: int) -> str:
    """The key in the tar of the sample with this rank among `total` names in order."""
    return f"{rank:0{_key_digits(total)}d}"


def _key_digits(total: int) -> int:
    return 8 if total <= 10**8 else len(str(total - 1))


def sorted_samples(split: str, given: Iterable[AnySample]) -> list[Sample]:
    samples = [sample if type(sample) is Sample else Sample(*sample) for sample in given]
    samples.sort(key=operator.itemgetter(0))
    if not samples:
        raise DataError(f"split {split!r} has no samples; nothing to pack")
    for i, sample in enumerate(samples):
        if i and sample.name == samples[i - 1].name:
            raise DataError(f"split {split!r}: two samples are named {sample.name!r}; names must be unique")
        if not sample.name.isprintable():  # also refuses the surrogates of undecodable file names
            raise DataError(f"split {split!r}: sample name {sample.name!r} holds unprintable characters; rename it")
    return samples


def class_names(given: Sequence[str] | None, splits: list[list[Sample]]) -> list[str]:
    if given is not None:
        for name in given:
            if list(given).count(name) > 1:
                raise DataError(f"class {name!r} is listed twice; class names must be unique")
        return list(given)
    labels = {sample.label for samples in splits for sample in samples}
    texts = [label for label in labels if isinstance(label, str)]
    if len(texts) == len(labels):
        return sorted(texts)
    if texts:
        raise DataError("some labels are names and some are numbers; use one kind for all samples")
    return [str(k) for k in range(max(cast(set[int], labels)) + 1)]


def class_numbers(split: str, samples: list[Sample], classes: list[str]) -> np.ndarray:
    """Class numbers of the samples, (n,) int32, each class present."""
    numbers = {name: k for k, name in enumerate(classes)}
    labels = np.empty(len(samples), dtype=np.int32)
    for i, (name, label, _) in enumerate(samples):
        if isinstance(label, str):
            if label not in numbers:
                near = difflib.get_close_matches(label, classes, 1)
                hint = f"did you mean {near[0]!r}?" if near else "add it to the classes or mend the label"
                raise DataError(f"split {split!r}, sample {name!r}: unknown class {label!r}; {hint}")
            labels[i] = numbers[label]
        else:
            try:
                number = operator.index(label)
            except TypeError:
                raise DataError(f"split {split!r}, sample {name!r}: label {label!r} is no whole number") from None
            if not 0 <= number < len(classes):
                raise DataError(
                    f"split {split!r}, sample {name!r}: label {number} is out of range for "
                    f"{len(classes)} classes (0 to {len(classes) - 1}); mend the label"
                )
            labels[i] = number
    refuse_empty_class(split, np.bincount(labels, minlength=len(classes)), classes, "has no sample")
    return labels


def refuse_empty_class(split: str, counts: np.ndarray, classes: list[str], why: str) -> None:
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise DataError(f"split {split!r}: empty class: {name!r} {why}; add images or take it from the classes")
