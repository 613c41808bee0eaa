"""A folder of class folders of images, with or without a level of splits above.

`INPUT/train/cat/1.jpg`, `INPUT/val/cat/2.jpg`: the splits as they are. `INPUT/cat/1.jpg`: one pile, packed as
one split or dealt to several. Folders below a class folder belong to the class.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from oat_dist.data.samples import Sample
from oat_dist.data.sources.splits import PackPlan, SplitRequest, deal_to_splits
from oat_dist.errors import DataError

__all__ = ["plan_imagefolder"]

_IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAMED_AT_MOST = 5


def plan_imagefolder(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """Find the classes and images below the folder `input`.

    Raises:
        DataError: no such folder, no class folder, an empty class, a class that a split lacks, images outside
            any class folder, a split that is not there.
    """
    root = Path(input)
    if not root.exists():
        raise DataError(f"{root}: no such folder; check the path")
    if not root.is_dir():
        raise DataError(f"{root}: a file, not a folder; unpack the archive first and give the folder it makes")
    ignored = _Ignored()
    try:
        top = _class_folders(root, root, ignored)
        found = _split_folders(root, top)
        if found:
            plan = _plan_split_folders(root, found, splits, ignored)
            ignored.files += [f"{name}/" for name in sorted(set(top) - {folder.name for folder in found.values()})]
        else:
            plan = _plan_classes(root, top, splits, seed, ignored)
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    plan.notes.extend(ignored.notes())
    return plan


@dataclass
class _Ignored:
    """What was met and not taken, by its name below the input; hidden files are not even met."""

    files: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        lines = (
            (self.files, "not an image and left out"),
            (self.links, "met before through a link and left out"),
        )
        return [f"{len(names)} {what}: {_some(sorted(names))}" for names, what in lines if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _printable(path: str) -> str:
    """A name as text, whatever bytes the file system holds: what is not UTF-8 becomes `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Visible entries in the order of their names."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its name. A dangling link counts: the packer reports it. A pipe does not: reading it may hang."""
    named_so = Path(entry.name).suffix.lower() in _IMAGE_SUFFIXES
    return named_so and not entry.is_dir() and (entry.is_file() or entry.is_symlink())


def _class_folders(root: Path, folder: Path, ignored: _Ignored) -> dict[str, Path]:
    """Sub-folders by printable name; images beside them would have no class."""
    folders: dict[str, Path] = {}
    for entry in _entries(folder):
        if entry.is_dir():
            folders[_printable(entry.name)] = Path(entry.path)
        elif _is_image(entry):
            raise DataError(
                f"{folder}: the image {_printable(entry.name)!r} lies in no class folder; "
                "put the images of each class into a folder named after it"
            )
        else:
            ignored.files.append(_printable(os.path.relpath(entry.path, root)))
    if not folders:
        raise DataError(f"{folder}: holds no class folder; put the images of each class into a folder named after it")
    return folders


def _split_folders(root: Path, top: dict[str, Path]) -> dict[str, Path]:
    """Split name -> folder, empty when the folders in `root` are the classes themselves."""
    found: dict[str, Path] = {}
    for name, folder in top.items():
        split = _SPLIT_FOLDERS.get(name.lower())
        # a class may be called "train": then it holds images and no folders, beside other classes
        only_splits = all(other.lower() in _SPLIT_FOLDERS for other in top)
        if split and (only_splits or any(entry.is_dir() for entry in _entries(folder))):
            if split in found:
                raise DataError(f"{root}: {found[split].name!r} and {name!r} both mean the split {split!r}; remove one")
            found[split] = folder
    return found


def _plan_split_folders(root: Path, found: dict[str, Path], splits: SplitRequest, ignored: _Ignored) -> PackPlan:
    there = ", ".join(found)
    if any(share is not None for share in splits.values()):
        raise DataError(f"{root}: is split already ({there}); leave the shares out of --split")
    for name in splits:
        if name not in found:
            raise DataError(f"{root}: has no split {name!r}; it has {there}")
    folders = {name: _class_folders(root, folder, ignored) for name, folder in found.items()}
    classes = sorted({name for by_class in folders.values() for name in by_class})
    planned: dict[str, list[Sample]] = {}
    for split, by_class in folders.items():
        for name in classes:
            if name not in by_class:
                raise DataError(
                    f"{found[split] / name}: empty class: split {split!r} lacks a class that another "
                    "split has; add images or remove the class everywhere"
                )
        planned[split] = [sample for name in classes for sample in _images(root, by_class[name], name, ignored)]
    _refuse_single_class(root, classes)
    return PackPlan("imagefolder", classes, {name: planned[name] for name in (splits or planned)})


def _plan_classes(root: Path, folders: dict[str, Path], splits: SplitRequest, seed: int, ignored: _Ignored) -> PackPlan:
    classes = sorted(folders)
    _refuse_single_class(root, classes)
    samples = [sample for name in classes for sample in _images(root, folders[name], name, ignored)]
    return PackPlan("imagefolder", classes, deal_to_splits(samples, splits or {"train": None}, seed))


def _refuse_single_class(root: Path, classes: list[str]) -> None:
    if len(classes) == 1:
        raise DataError(
            f"{root}: holds the single class {classes[0]!r}; a classifier needs two. If the class folders "
            f"lie deeper, give the folder that holds them, such as {root / classes[0]}"
        )


def _images(root: Path, folder: Path, label: str, ignored: _Ignored) -> list[Sample]:
    """All images at any depth below a class folder, each real folder walked once (links may form a loop)."""
    samples: list[Sample] = []
    walked: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        current = waiting.pop()
        status = Path(current).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in walked:
            ignored.links.append(_printable(os.path.relpath(current, root)))
            continue
        walked.add(identity)
        entries = _entries(current)
        for entry in entries:
            name = _printable(os.path.relpath(entry.path, root))
            if _is_image(entry):
                samples.append(Sample(name, label, Path(entry.path)))
            elif not entry.is_dir():
                ignored.files.append(name)
        waiting += [entry.path for entry in reversed(entries) if entry.is_dir()]
    if not samples:
        raise DataError(f"{folder}: empty class: no image in this folder; add images or remove the folder")
    return samples
