"""The samples in one tar: which members belong together, the image, the label, and what the image is.

1. Members are grouped as webdataset does: the key ends at the first dot after the last slash, the rest is the kind
   (lower case); the members of a sample follow one another.
2. Of each sample the image is read, and the label; other members are only counted.
3. Images are examined in small lots, if wanted in several threads: decoded, measured, hashed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from oat_dist.data.foreign.rules import Rules, label_text
from oat_dist.data.tars.image_lots import Examine, Examiner, Fault
from oat_dist.data.tars.tarstream import TarStream
from oat_dist.errors import DataError

__all__ = ["IMAGE_KINDS", "AmbiguousError", "ShardScan", "scan_samples"]

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm")

_LARGEST_IMAGE = 1 << 30
_LARGEST_LABEL = 1 << 20
_META = re.compile(r"__[^/]*__($|/)")
_NO_TEXT = b"\xff"
_LABEL, _IMAGE, _OTHER = range(3)
_KINDS_REMEMBERED = 1000


class AmbiguousError(DataError):
    """A sample has several images, and nobody has said which one counts."""


@dataclass
class ShardScan:
    """What a tar holds; arrays have one row a sample, in the tar's order, with zeros where something is missing.

    Attributes:
        keys: webdataset's key of every sample.
        labels: the different labels; `label` numbers them, -1 is none.
        width, height, hash, crc: as of `Examined`.
        others: kind -> how many members of it were not used; "" for names without a key.
        damage: why the tar could not be read to its end; the rows are those before. Size and SHA-256 hold anyway.
        json: the start of the first JSON member that was not used, for messages.
    """

    size: int = 0
    sha256: str = ""
    damage: str = ""
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    json: bytes = b""
    offset: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    length: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    label: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    width: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    height: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    hash: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    crc: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))


def scan_samples(
    read: Callable[[int], bytes],
    rules: Rules,
    examine: Examine,
    *,
    threads: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> ShardScan:
    """Read a tar once, from start to end.

    Args:
        read: as of `TarStream`; what it raises goes through.
        examine: says what an image is.
        threads: how many call `examine`.
        advance: told how many samples have been examined.

    Raises:
        AmbiguousError: several images in a sample.
    """
    stream = TarStream(read)
    rows = _Rows(rules, Examiner(examine, threads, advance))
    try:
        try:
            _group(stream, rules, rows)
        except AmbiguousError:
            raise
        except DataError as error:
            rows.scan.damage = str(error)
            stream.exhaust()
        return rows.finish(stream)
    finally:
        rows.examiner.close()


class _Kinds(dict[str, tuple[str, int, int]]):
    """What a member's kind, as it is written, is to us: (in lower case, role, rank among the kinds of images)."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._rules = rules

    def __missing__(self, written: str) -> tuple[str, int, int]:
        kind, images = written.lower(), self._rules.images
        if kind == self._rules.label:
            found = kind, _LABEL, 0
        elif images:
            found = (kind, _IMAGE, images.index(kind)) if kind in images else (kind, _OTHER, 0)
        else:
            found = kind, _IMAGE if kind.rpartition(".")[2] in IMAGE_KINDS else _OTHER, 0
        if len(self) < _KINDS_REMEMBERED:
            self[written] = found
        return found


def _group(stream: TarStream, rules: Rules, rows: _Rows) -> None:
    """Make rows of the members. All in one function, and in its local names: it runs for every member."""
    known, scan, keys = _Kinds(rules), rows.scan, set[str]()
    key, kinds, image, best, at, length = "", list[str](), "", 0, 0, 0
    data: bytes | None = None
    label: bytes | None = None
    for name, offset, size in stream:
        slash = name.rfind("/") + 1
        dot = name.find(".", slash)
        if dot <= slash or (name[:2] == "__" and _META.match(name)):
            scan.others[""] += 1
            continue
        kind, role, rank = known[name[dot + 1 :]]
        if name[:dot] != key:
            if key:
                rows.add(key, image, at, length, data, label)
            key, kinds, image, data, label = name[:dot], [], "", None, None
            if key in keys:
                raise DataError(
                    f"the members of sample {key} do not follow one another; write the tar anew in the order of names "
                    "(tar --sort=name)"
                )
            keys.add(key)
        elif kind in kinds:
            raise DataError(f"member {name} comes twice; write the tar anew with different keys")
        kinds.append(kind)
        if role == _IMAGE and (not image or _is_better(key, kind, rank, image, best, rules)):
            image, best, at, length = kind, rank, offset, size
            data = stream.content() if size <= _LARGEST_IMAGE else None
        elif role == _LABEL:
            label = stream.content() if size <= _LARGEST_LABEL else _NO_TEXT
        elif role == _OTHER:
            scan.others[kind] += 1
            if kind == "json" and not scan.json and size <= _LARGEST_LABEL:
                scan.json = stream.content()
    if key:
        rows.add(key, image, at, length, data, label)


def _is_better(key: str, kind: str, rank: int, image: str, best: int, rules: Rules) -> bool:
    """Whether this image is the sample's rather than the one before."""
    if rules.images:
        return rank < best
    raise AmbiguousError(
        f"sample {key} has several images, .{image} and .{kind} (a key ends at the first dot of a file name); say "
        "which one counts: --image-key"
    )


class _Rows:
    """Takes the samples one by one."""

    def __init__(self, rules: Rules, examiner: Examiner) -> None:
        self.scan = ShardScan()
        self.examiner = examiner
        self._rules = rules
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._codes: list[int] = []
        self._code_of: dict[str, int] = {}
        self._code_of_data: dict[bytes, int] = {}  # the same by the bytes of a label of text: quicker

    def add(self, key: str, image: str, offset: int, length: int, data: bytes | None, label: bytes | None) -> None:
        position = len(self._codes)
        self.scan.keys.append(key)
        if data is not None:
            self.examiner.add(position, data)
        else:
            if image:
                self._fault(position, "unreadable image", f"unreadable image ({length:,} bytes, more than 1 GiB)")
            else:
                self._fault(position, "no image", "there is no image")
            offset = length = 0
        self._offsets.append(offset)
        self._lengths.append(length)
        code = None if label is None else self._code_of_data.get(label)
        self._codes.append(self._code(position, label) if code is None else code)

    def _code(self, position: int, label: bytes | None) -> int:
        """The number of the sample's label, among those met so far; -1 for none."""
        if label is None:
            self._fault(position, "no label", f"there is no .{self._rules.label}")
            return -1
        try:
            text = label_text(label, self._rules)
        except KeyError as error:
            self._fault(position, "no label", error.args[0])
        except ValueError as error:
            self._fault(position, "unreadable label", str(error))
        else:
            code = self._code_of.setdefault(text, len(self._code_of))
            if not self._rules.path:
                self._code_of_data[label] = code
            return code
        return -1

    def _fault(self, position: int, kind: str, text: str) -> None:
        self.scan.faults.append(Fault(position, kind, text))

    def finish(self, stream: TarStream) -> ShardScan:
        scan = self.scan
        scan.size, scan.sha256 = stream.size, stream.digest()
        scan.offset = np.array(self._offsets, dtype=np.uint64)
        scan.length = np.array(self._lengths, dtype=np.uint32)
        scan.label = np.array(self._codes, dtype=np.int32)
        scan.labels = list(self._code_of)
        scan.width, scan.height, scan.hash, scan.crc, faults = self.examiner.finish(len(scan.keys))
        scan.faults = sorted([*scan.faults, *faults])
        return scan
