"""From the labels found in shards, as text, to class numbers.

Labels that are all whole numbers are class numbers. Others are class names, numbered in sorted order or in the order of
a given list.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oat_dist.errors import DataError

__all__ = ["class_numbers_of", "number_labels", "read_classes"]

_NUMBER = re.compile(r"[+-]?[0-9]+")
_MOST_CLASSES = 1_000_000
_CAPTIONS_FROM = 1_000
_OTHER_LABEL = "choose another --label"


def read_classes(path: Path) -> list[str]:
    """Class names out of a text file, one a line, in the order of their numbers.

    Raises:
        DataError: no such file, no text, no names, a name that is empty, unprintable or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a text file with one class name a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text; give a text file with one class name a line") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise DataError(f"{path}: is empty; write one class name a line, in the order of their numbers")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or not name.isprintable():
            raise DataError(f"{path}, line {number}: {name!r} is no class name; write one name a line")
        if name in first:
            raise DataError(f"{path}, line {number}: {name!r} is there already in line {first[name]}; names are unique")
        first[name] = number
    return names


def number_labels(
    texts: Sequence[str], samples: int, classes: Sequence[str] | None, first_label: int = 0, whose: str = "--classes"
) -> tuple[list[str], np.ndarray]:
    """Class names, and the class number of each of the different labels `texts`, (len(texts),) int32.

    Args:
        samples: how many samples bear these labels.
        classes: the class names, if they are known; `whose` says from where.
        first_label: the number of the first class, where labels are numbers.

    Raises:
        DataError: numbers and names mixed, a label out of range, an unknown name, or too many different ones.
    """
    numbers = [text for text in texts if _NUMBER.fullmatch(text)]
    if len(numbers) == len(texts):
        return _as_numbers([int(text) for text in texts], samples, classes, first_label, whose)
    if numbers:
        name = next(text for text in texts if text not in numbers)
        raise DataError(
            f"some labels are numbers ({numbers[0]}) and some are names ({name}); {_OTHER_LABEL}, or mend the data"
        )
    if first_label:
        raise DataError(f"--first-label counts numbers, but the labels are names ({texts[0]}); leave it out")
    if classes is None:
        if len(texts) > max(_CAPTIONS_FROM, samples // 2):
            raise DataError(
                f"{len(texts):,} different labels for {samples:,} samples ({min(texts)!r}): these are captions or "
                f"names, not classes; {_OTHER_LABEL}"
            )
        classes = sorted(texts)
    known = {name: number for number, name in enumerate(classes)}
    for text in sorted(texts):
        if text not in known:
            near = difflib.get_close_matches(text, classes, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"label {text!r} is none of the {len(classes)} classes of {whose}; {hint}mend either of them"
            )
    return list(classes), np.array([known[text] for text in texts], dtype=np.int32)


def _as_numbers(
    values: list[int], samples: int, classes: Sequence[str] | None, first: int, whose: str
) -> tuple[list[str], np.ndarray]:
    least, most = min(values), max(values)
    if least < first:
        hint = "leave out --first-label" if least >= 0 else f"-1 often stands for none: {_OTHER_LABEL}"
        raise DataError(f"label {least} lies below the first class, {first}; {hint}")
    if classes is None:
        count = most - first + 1
        if count > min(_MOST_CLASSES, max(_CAPTIONS_FROM, samples)):
            raise DataError(
                f"labels run up to {most:,} in {samples:,} samples: these are ids, not classes; {_OTHER_LABEL}"
            )
        classes = [str(first + number) for number in range(count)]
    elif most - first >= len(classes):
        hint = "; if they count from 1, give --first-label 1" if least == 1 and most == len(classes) else ""
        raise DataError(
            f"label {most} is out of range for the {len(classes)} classes of {whose} "
            f"({first} to {first + len(classes) - 1}){hint or '; mend either of them'}"
        )
    return list(classes), np.array([value - first for value in values], dtype=np.int32)


def class_numbers_of(texts: Sequence[str], classes: Sequence[str], first_label: int) -> np.ndarray:
    """The class number of each label as `number_labels` gives it, (len(texts),) int64; -1 where there is none."""
    known = {name: number for number, name in enumerate(classes)}
    numbers = [int(text) - first_label if _NUMBER.fullmatch(text) else known.get(text, -1) for text in texts]
    return np.array([number if 0 <= number < len(classes) else -1 for number in numbers], dtype=np.int64)
