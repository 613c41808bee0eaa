"""What may be done to the training split of any source before it is packed: a part held out, a long tail made.

Which images go is decided by a keyed hash of their names below the folder that all of them share, so that `INPUT` loses
the same images of `INPUT/train` as `INPUT/train` packed alone does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from oat_dist.data.packing.samples import Sample, class_numbers, seeded_order
from oat_dist.data.sources.splits import PackPlan, deal_to_splits, list_some
from oat_dist.errors import DataError

__all__ = ["hold_out", "make_long_tailed"]

_TRAIN = "train"


def hold_out(plan: PackPlan, shares: Mapping[str, Fraction], seed: int) -> PackPlan:
    """Deal these shares of each class of the split train into new splits, as `deal_to_splits` does; the rest stays.

    Raises:
        DataError: no split train, a split of such a name is there already, or a class too small to be in each split.
    """
    if not shares:
        return plan
    samples = _train_samples(plan, "--hold-out")
    for name in shares:
        if name in plan.splits:
            raise DataError(f"--hold-out {name}: the input has a split {name!r} already; choose another name")
    dealing = {_TRAIN: 1 - sum(shares.values(), Fraction(0)), **shares}
    parts = deal_to_splits(samples, dealing, seed, below=_shared_folder(samples))
    others = {name: part for name, part in plan.splits.items() if name != _TRAIN}
    held = ", ".join(f"{len(parts[name]):,} as {name}" for name in shares)
    return replace(
        plan, splits=parts | others, notes=[*plan.notes, f"held out of {len(samples):,} images of train: {held}"]
    )


def make_long_tailed(plan: PackPlan, imbalance: float | None, seed: int) -> PackPlan:
    """Thin the split train to an exponential profile (Cui et al. 2019, Cao et al. 2019); None leaves it as it is.

    Class k of C keeps the whole part of `n * imbalance ** (-k / (C - 1))` images, n those of the largest class; all, if
    it has no more. The images of a larger imbalance are among those of a smaller one.

    Raises:
        DataError: no split train, an imbalance below 1, less than two classes, or a class that would keep no image.
    """
    if imbalance is None:
        return plan
    if not 1 <= imbalance < math.inf:
        raise DataError(
            f"--long-tail is {imbalance:g}; it must be at least 1: images of the first class over the last's"
        )
    samples = _train_samples(plan, "--long-tail")
    classes = plan.classes
    if len(classes) < 2:
        raise DataError("--long-tail: there is a single class; a long tail takes two or more")
    by_class: list[list[Sample]] = [[] for _ in classes]
    for sample, label in zip(samples, class_numbers(_TRAIN, samples, classes), strict=True):
        by_class[label].append(sample)
    largest = max(map(len, by_class))
    if imbalance > largest:
        raise DataError(
            f"--long-tail {imbalance:g}: the last class, {classes[-1]!r}, would keep no image: the largest class of "
            f"train has {largest:,}; choose an imbalance of at most {largest:,}"
        )
    start = len(_shared_folder(samples))
    kept: list[Sample] = []
    counts: list[int] = []
    short: list[str] = []
    for k, members in enumerate(by_class):
        # to 6 digits first, so that a whole number that comes out a little low is not made one less
        target = math.floor(round(largest * imbalance ** (-k / (len(classes) - 1)), 6))
        if len(members) < target:
            short.append(f"{classes[k]} ({len(members):,} of {target:,})")
        order = seeded_order([sample.name[start:] for sample in members], seed)
        kept += [members[i] for i in order[:target]]
        counts.append(min(target, len(members)))
    remark = f"long-tailed, imbalance {imbalance:g}"
    notes = [*plan.notes, f"train is {remark}: {len(kept):,} of {len(samples):,} images, {_range(classes, counts)}"]
    if short:
        notes.append(f"classes with fewer images than their place in the tail asks for keep all: {list_some(short)}")
    return replace(plan, splits=plan.splits | {_TRAIN: kept}, notes=notes, remarks=plan.remarks | {_TRAIN: remark})


def _train_samples(plan: PackPlan, option: str) -> list[Sample]:
    if _TRAIN not in plan.splits:
        raise DataError(f"{option}: there is no split {_TRAIN!r} to take from, only {', '.join(plan.splits)}")
    return plan.splits[_TRAIN]


def _shared_folder(samples: Sequence[Sample]) -> str:
    """`train/` of `train/cat/1.jpg` and `train/dog/1.jpg`; empty if they share none."""
    ends = [pick(sample.name for sample in samples) for pick in (min, max)]  # what these two share, all do
    folder, slash, _ = os.path.commonprefix(ends).rpartition("/")  # noqa: RUF071 - a folder is cut off here
    return folder + slash


def _range(classes: Sequence[str], counts: Sequence[int]) -> str:
    most, least = counts.index(max(counts)), counts.index(min(counts))
    return f"{counts[most]:,} of {classes[most]} to {counts[least]:,} of {classes[least]}"
