"""What a source hands to the packer, and how one pile of images is dealt to splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from oat_dist.data.packing.samples import Sample, seeded_order
from oat_dist.errors import DataError

__all__ = [
    "SPLIT_NAMES",
    "PackPlan",
    "SplitRequest",
    "chosen_splits",
    "deal_to_splits",
    "list_some",
    "other_counts",
    "parse_hold_out",
    "parse_splits",
]

# split name -> its share of every class; None: the split as a whole
SplitRequest = Mapping[str, Fraction | None]

# what people call the usual splits, in lower case -> what we call them
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class PackPlan:
    """Everything a source found: the common classes, the samples by split, and notes for the user.

    `remarks` by split say in its manifest, after the source, what was done to it.
    """

    source: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    notes: list[str] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)

    def sources(self) -> dict[str, str]:
        """By split, what its manifest calls its source: `cifar10; long-tailed, imbalance 100`."""
        return {
            name: f"{self.source}; {self.remarks[name]}" if name in self.remarks else self.source
            for name in self.splits
        }


def parse_splits(texts: Sequence[str]) -> dict[str, Fraction | None]:
    """Read `["train=0.8", "val=0.2"]`, `["train=0.8,val=0.2"]` or `["test"]`; shares may be written 2/3.

    Raises:
        DataError: a share that is no number above 0, shares that do not add up to 1, a name given twice,
            names with and without a share.
    """
    splits = _parse_names("--split", texts, "NAME or NAME=SHARE, such as train=0.8")
    shares = [share for share in splits.values() if share is not None]
    if shares and len(shares) != len(splits):
        raise DataError("--split: give every split a share (train=0.8,val=0.2), or none")
    if shares and (min(shares) <= 0 or sum(shares) != 1):
        raise DataError(f"--split: shares must be above 0 and add up to 1, not {float(sum(shares)):g}")
    return splits


def parse_hold_out(texts: Sequence[str]) -> dict[str, Fraction]:
    """Read `["val=0.1"]` or `["val=0.1,calibration=1/10"]`.

    Raises:
        DataError: a name without a share, a share that is no number above 0, shares that leave nothing of the split.
    """
    named = _parse_names("--hold-out", texts, "NAME=SHARE, such as val=0.1")
    shares = {name: share for name, share in named.items() if share is not None}
    if len(shares) < len(named):
        raise DataError("--hold-out: say how much, NAME=SHARE, such as val=0.1")
    if shares and (min(shares.values()) <= 0 or sum(shares.values()) >= 1):
        raise DataError("--hold-out: shares must be above 0 and add up to less than 1; the rest stays in train")
    return shares


def _parse_names(option: str, texts: Sequence[str], form: str) -> dict[str, Fraction | None]:
    splits: dict[str, Fraction | None] = {}
    for text in ",".join(texts).split(",") if texts else []:
        name, equals, share = (part.strip() for part in text.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise DataError(f"{option} {text!r}: write {form}")
        if name in splits:
            raise DataError(f"{option} {name} is given twice; name each split once")
        try:
            splits[name] = Fraction(share) if equals else None
        except (ValueError, ZeroDivisionError):
            raise DataError(f"{option} {text!r}: {share!r} is not a number; write a share such as 0.8 or 4/5") from None
    return splits


def chosen_splits(where: object, there: Iterable[str], splits: SplitRequest) -> list[str]:
    """Names of the splits to pack of an input that is split already into `there`: those asked for, or all.

    Raises:
        DataError: shares were given, or a split that is not there.
    """
    names = list(there)
    if any(share is not None for share in splits.values()):
        raise DataError(
            f"{where}: is split already ({', '.join(names)}); leave the shares out of --split, or use --hold-out"
        )
    for name in splits:
        if name not in names:
            raise DataError(f"{where}: has no split {name!r}; it has {', '.join(names)}")
    return list(splits) or names


def other_counts(name: str, planned: Mapping[str, Sequence[Sample]], published: Mapping[str, int]) -> list[str]:
    """A note if splits have other numbers of samples than the published data set: a download may be incomplete."""
    others = [
        f"{split} has {len(samples):,} ({published[split]:,})"
        for split, samples in planned.items()
        if len(samples) != published[split]
    ]
    return [f"not as many as in {name} as published (in brackets): {', '.join(others)}"] if others else []


def list_some(names: Sequence[str]) -> str:
    """The first five, and how many more."""
    more = f" and {len(names) - _NAMED_AT_MOST:,} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def deal_to_splits(
    samples: Sequence[Sample], splits: SplitRequest, seed: int, *, below: str = ""
) -> dict[str, list[Sample]]:
    """Deal `samples` to `splits`, class by class: the counts by largest remainder, the members by a keyed
    hash of their names, without the folder `below` that all names begin with.

    Raises:
        DataError: several splits without shares, or a class too small to be in each split.
    """
    if len(splits) == 1:
        return {name: list(samples) for name in splits}
    shares: dict[str, Fraction] = {}
    for name, share in splits.items():
        if share is None:
            raise DataError(f"--split: say how much each split gets, such as {name}=0.8; the input is not split yet")
        shares[name] = share
    by_class: dict[int | str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.name):
        by_class.setdefault(sample.label, []).append(sample)
    dealt: dict[str, list[Sample]] = {name: [] for name in shares}
    for label, members in by_class.items():
        order = seeded_order([sample.name[len(below) :] for sample in members], seed)
        start = 0
        for name, count in _counts(len(members), shares).items():
            if not count:
                raise DataError(
                    f"class {label!r} has only {len(members)} images, none of them for split {name!r} "
                    f"({float(shares[name]):g}); add images or raise that share"
                )
            dealt[name] += [members[i] for i in order[start : start + count]]
            start += count
    return dealt


def _counts(total: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers that add up to `total`, nearest to the shares (largest remainder, earlier name first)."""
    counts = {name: int(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: shares[name] * total - counts[name], reverse=True)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
