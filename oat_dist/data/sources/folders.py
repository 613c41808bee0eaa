"""A folder of class folders of images or videos, with or without a level of splits above.

`INPUT/train/cat/1.jpg`, `INPUT/val/cat/2.jpg`: the splits as they are. `INPUT/cat/1.jpg`: one pile, packed as
one split or dealt to several. Folders below a class folder belong to the class.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from oat_dist.data.images.video import middle_frame_png
from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.splits import (
    SPLIT_NAMES,
    PackPlan,
    SplitRequest,
    chosen_splits,
    deal_to_splits,
    list_some,
)
from oat_dist.errors import DataError

__all__ = ["IMAGES", "VIDEOS", "Kind", "input_folder", "plan_folders", "printable", "visible_entries"]


def _file_itself(path: str) -> str:
    return path


def _middle_frame(path: str) -> Callable[[], bytes]:
    return functools.partial(middle_frame_png, path)


@dataclass(frozen=True)
class Kind:
    """What files make samples: known by their names, and how a sample's bytes are got from one."""

    noun: str
    suffixes: frozenset[str]
    data: Callable[[str], str | Callable[[], bytes]]

    def holds(self, entry: os.DirEntry[str]) -> bool:
        """A dangling link counts: the packer reports it. A pipe does not: reading it may hang."""
        _, dot, ending = entry.name.rpartition(".")
        return (
            f"{dot}{ending.lower()}" in self.suffixes and not entry.is_dir() and (entry.is_file() or entry.is_symlink())
        )


IMAGES = Kind(
    "image",
    frozenset(
        (
            *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp"),
            *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
        )
    ),
    _file_itself,
)
VIDEOS = Kind("video", frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")), _middle_frame)


def input_folder(input: str) -> Path:
    """Raises `DataError` if `input` is no folder."""
    root = Path(input)
    if not root.exists():
        raise DataError(f"{root}: no such folder; check the path")
    if not root.is_dir():
        raise DataError(f"{root}: a file, not a folder; unpack the archive first and give the folder it makes")
    return root


def plan_folders(
    input: str, kind: Kind, *, source: str, splits: SplitRequest, seed: int, need_splits: bool = False
) -> PackPlan:
    """Find the classes and files of `kind` below the folder `input`.

    Args:
        source: the name of the source, for the manifest.
        need_splits: refuse a folder whose sub-folders are the classes themselves.

    Raises:
        DataError: no such folder, no class folder, an empty class, a class that a split lacks, files outside
            any class folder, a split that is not there.
    """
    root = input_folder(input)
    walk = _Walk(root, kind)
    try:
        top = walk.class_folders(root)
        found = _split_folders(root, top)
        if need_splits and not {"train", "test"} <= found.keys():
            raise DataError(f"{root}: holds no folders Train and Test; give the folder that holds the two")
        if found:
            classes, planned = _plan_split_folders(walk, found, splits)
            walk.left_out += [f"{name}/" for name in sorted(set(top) - {folder.name for folder in found.values()})]
        else:
            classes, planned = _plan_classes(walk, top, splits, seed)
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    return PackPlan(source, classes, planned, walk.notes())


def printable(path: str) -> str:
    """A name as text, whatever bytes the file system holds: what is not UTF-8 becomes `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Visible entries in the order of their names."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


@dataclass
class _Walk:
    """One walk below `root`, and what was met on it and not taken; hidden files are not even met."""

    root: Path
    kind: Kind
    left_out: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        article = "an" if self.kind.noun[0] in "aeiou" else "a"
        lines = (
            (self.left_out, f"not {article} {self.kind.noun} and left out"),
            (self.links, "met before through a link and left out"),
        )
        return [f"{len(names)} {what}: {list_some(sorted(names))}" for names, what in lines if names]

    def class_folders(self, folder: Path) -> dict[str, Path]:
        """Sub-folders by printable name; files of our kind beside them would have no class."""
        noun = self.kind.noun
        folders: dict[str, Path] = {}
        for entry in visible_entries(folder):
            if entry.is_dir():
                folders[printable(entry.name)] = Path(entry.path)
            elif self.kind.holds(entry):
                raise DataError(
                    f"{folder}: the {noun} {printable(entry.name)!r} lies in no class folder; "
                    f"put the {noun}s of each class into a folder named after it"
                )
            else:
                self.left_out.append(printable(os.path.relpath(entry.path, self.root)))
        if not folders:
            raise DataError(
                f"{folder}: holds no class folder; put the {noun}s of each class into a folder named after it"
            )
        return folders

    def samples(self, folder: Path, label: str) -> list[Sample]:
        """All files of our kind at any depth below a class folder, each real folder walked once (links may loop)."""
        samples: list[Sample] = []
        walked: set[tuple[int, int]] = set()
        waiting = [str(folder)]
        while waiting:
            current = waiting.pop()
            status = Path(current).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in walked:
                self.links.append(printable(os.path.relpath(current, self.root)))
                continue
            walked.add(identity)
            entries = visible_entries(current)
            place = printable(os.path.relpath(current, self.root))
            for entry in entries:
                name = f"{place}/{printable(entry.name)}"
                if self.kind.holds(entry):
                    samples.append(Sample(name, label, self.kind.data(entry.path)))
                elif not entry.is_dir():
                    self.left_out.append(name)
            waiting += [entry.path for entry in reversed(entries) if entry.is_dir()]
        if not samples:
            noun = self.kind.noun
            raise DataError(f"{folder}: empty class: no {noun} in this folder; add {noun}s or remove the folder")
        return samples


def _split_folders(root: Path, top: dict[str, Path]) -> dict[str, Path]:
    """Split name -> folder, empty when the folders in `root` are the classes themselves."""
    found: dict[str, Path] = {}
    for name, folder in top.items():
        split = SPLIT_NAMES.get(name.lower())
        # a class may be called "train": then it holds images and no folders, beside other classes
        only_splits = all(other.lower() in SPLIT_NAMES for other in top)
        if split and (only_splits or any(entry.is_dir() for entry in visible_entries(folder))):
            if split in found:
                raise DataError(f"{root}: {found[split].name!r} and {name!r} both mean the split {split!r}; remove one")
            found[split] = folder
    return {split: found[split] for split in SPLIT_NAMES.values() if split in found}


def _plan_split_folders(
    walk: _Walk, found: dict[str, Path], splits: SplitRequest
) -> tuple[list[str], dict[str, list[Sample]]]:
    chosen = chosen_splits(walk.root, found, splits)
    folders = {name: walk.class_folders(folder) for name, folder in found.items()}
    classes = sorted({name for by_class in folders.values() for name in by_class})
    planned: dict[str, list[Sample]] = {}
    for split, by_class in folders.items():
        for name in classes:
            if name not in by_class:
                raise DataError(
                    f"{found[split] / name}: empty class: split {split!r} lacks a class that another "
                    f"split has; add {walk.kind.noun}s or remove the class everywhere"
                )
        planned[split] = [sample for name in classes for sample in walk.samples(by_class[name], name)]
    _refuse_single_class(walk.root, classes)
    return classes, {name: planned[name] for name in chosen}


def _plan_classes(
    walk: _Walk, folders: dict[str, Path], splits: SplitRequest, seed: int
) -> tuple[list[str], dict[str, list[Sample]]]:
    classes = sorted(folders)
    _refuse_single_class(walk.root, classes)
    samples = [sample for name in classes for sample in walk.samples(folders[name], name)]
    return classes, deal_to_splits(samples, splits or {"train": None}, seed)


def _refuse_single_class(root: Path, classes: list[str]) -> None:
    if len(classes) == 1:
        raise DataError(
            f"{root}: holds the single class {classes[0]!r}; a classifier needs two. If the class folders "
            f"lie deeper, give the folder that holds them, such as {root / classes[0]}"
        )
