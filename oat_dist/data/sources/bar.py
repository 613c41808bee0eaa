"""BAR, six kinds of action photos with biased places (Nam et al., 2020): flat folders, the class in the file's name."""

from __future__ import annotations

import re
from pathlib import Path

from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.folders import IMAGES, input_folder, printable, visible_entries
from oat_dist.data.sources.splits import PackPlan, SplitRequest, chosen_splits, list_some, other_counts
from oat_dist.errors import DataError

__all__ = ["HELP", "plan_bar"]

_PUBLISHED = {"train": 1_941, "test": 654}
_CLASSES = ["climbing", "diving", "fishing", "pole vaulting", "racing", "throwing"]
# pole vaulting_12.jpg: the class is all before the last underscore and a number
_NAME = re.compile(r"(?P<label>.*\S)_[0-9]+\.[A-Za-z]+")

HELP = """\
INPUT holds train/<class>_<number>.jpg and test/<class>_<number>.jpg as published: flat folders, six classes,
one of them "pole vaulting" with its space (1,941 and 654 images)"""


def plan_bar(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """Images of the two flat folders; files whose names do not fit are left out and named in a note.

    Raises:
        DataError: no such folders, no image whose name fits, a class that a split lacks.
    """
    root = input_folder(input)
    planned: dict[str, list[Sample]] = {}
    misfits: list[str] = []
    for split in chosen_splits(root, _PUBLISHED, splits):
        folder = root / split
        if not folder.is_dir():
            raise DataError(f"{root}: has no folder {split!r}; give the folder that holds train and test")
        try:
            planned[split] = _flat_samples(folder, split, misfits)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    classes = sorted({str(sample.label) for samples in planned.values() for sample in samples})
    for split, samples in planned.items():
        lacking = sorted(set(classes) - {str(sample.label) for sample in samples})
        if lacking:
            raise DataError(
                f"{root / split}: empty class: no image of {list_some(lacking)}, which another split has; add images"
            )
    if len(classes) == 1:
        raise DataError(f"{root}: holds the single class {classes[0]!r}; a classifier needs two")
    notes = []
    if misfits:
        notes.append(f"{len(misfits)} not named <class>_<number>.jpg and left out: {list_some(misfits)}")
    if classes != _CLASSES:
        notes.append(f"the classes are not BAR's six: {', '.join(classes)}")
    notes += other_counts("BAR", planned, _PUBLISHED)
    return PackPlan("bar", classes, planned, notes)


def _flat_samples(folder: Path, split: str, misfits: list[str]) -> list[Sample]:
    samples = []
    for entry in visible_entries(folder):
        name = f"{split}/{printable(entry.name)}"
        match = _NAME.fullmatch(printable(entry.name))
        if match and IMAGES.holds(entry):
            samples.append(Sample(name, match["label"], Path(entry.path)))
        else:
            misfits.append(f"{name}/" if entry.is_dir() else name)
    if not samples:
        raise DataError(
            f"{folder}: no image named <class>_<number>.jpg"
            + (f", only {list_some(misfits)}" if misfits else "")
            + "; for class folders use the source imagefolder"
        )
    return samples
