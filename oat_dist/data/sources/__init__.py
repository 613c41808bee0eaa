"""Where images come from: each source examines its input and gives a `PackPlan`, writing nothing.

Adding a `Source` to `SOURCES` makes it known to `pack`, with its options and its help.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oat_dist.data.sources import bar, cifar10, digits, era, imagefolder, table, ucf101
from oat_dist.data.sources.splits import PackPlan, SplitRequest, parse_hold_out, parse_splits
from oat_dist.data.sources.train_split import hold_out, make_long_tailed
from oat_dist.errors import DataError

__all__ = [
    "SOURCES",
    "PackPlan",
    "Source",
    "SourceOption",
    "SplitRequest",
    "add_source_arguments",
    "parse_splits",
    "plan_source",
]


@dataclass(frozen=True)
class SourceOption:
    """A command-line option of one source, handed to its function as `keyword` when it is given."""

    flag: str
    keyword: str
    metavar: str
    help: str
    kind: Callable[[str], Any] = str
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A kind of input: `plan(input, *, splits, seed, ...)` examines it; `help` says what it looks like."""

    plan: Callable[..., PackPlan]
    help: str
    options: tuple[SourceOption, ...] = ()
    needs_on_bad: bool = False  # its function also takes on_bad="stop" or "skip", for files that are missing

    def __call__(self, input: str, *, splits: SplitRequest, seed: int, **settings: Any) -> PackPlan:
        """Plan the packing of `input` (a path, or "-"); raises `DataError` for anything unusable."""
        return self.plan(input, splits=splits, seed=seed, **settings)


_UCF101_OPTIONS = (
    SourceOption("--list", "list_number", "N", "official train and test list: 1, 2 or 3 (default: 1)", int, (1, 2, 3)),
    SourceOption("--lists", "lists", "FOLDER", "folder of the official lists (default: looked for by the videos)"),
)
_TABLE_OPTIONS = (
    SourceOption("--path-column", "path_column", "NAME", "column, or key, of the file's path (default: path)"),
    SourceOption("--label-column", "label_column", "NAME", "of its class, a name or a whole number (default: label)"),
    SourceOption("--split-column", "split_column", "NAME", "of its split (default: split, where there is one)"),
    SourceOption("--root", "root", "FOLDER", "folder that paths are relative to (default: that of the table)"),
    SourceOption("--classes", "classes", "FILE", "class names in their order, one a line; labels may be positions"),
)

SOURCES: dict[str, Source] = {
    "imagefolder": Source(imagefolder.plan_imagefolder, imagefolder.HELP),
    "table": Source(table.plan_table, table.HELP, _TABLE_OPTIONS, needs_on_bad=True),
    "cifar10": Source(cifar10.plan_cifar10, cifar10.HELP),
    "ucf101": Source(ucf101.plan_ucf101, ucf101.HELP, _UCF101_OPTIONS, needs_on_bad=True),
    "era": Source(era.plan_era, era.HELP),
    "bar": Source(bar.plan_bar, bar.HELP),
    "digits": Source(digits.plan_digits, digits.HELP),
}


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE, INPUT and the options of all sources, with what each expects its input to look like."""
    layouts = "\n".join(f"{name}\n{textwrap.indent(source.help, '  ')}" for name, source in SOURCES.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group("what to pack", layouts)
    group.add_argument("source", choices=list(SOURCES), metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    group.add_argument("input", metavar="INPUT", help="folder or file to read, as above; - for digits")
    for name, source in SOURCES.items():
        if source.options:
            group = parser.add_argument_group(f"options of the source {name}")
            for option in source.options:
                group.add_argument(
                    option.flag,
                    dest=option.keyword,
                    type=option.kind,
                    choices=option.choices,
                    metavar=option.metavar,
                    help=option.help,
                )


def plan_source(args: argparse.Namespace) -> PackPlan:
    """The plan for `args` of a parser with `add_source_arguments` and `--seed`, `--on-bad`, `--long-tail`,
    `--split` and `--hold-out` (lists).

    Raises:
        DataError: an option of another source was given; what the source finds wrong, `hold_out` or `make_long_tailed`.
    """
    splits, held_out = parse_splits(args.split), parse_hold_out(args.hold_out)
    given = {keyword: value for keyword, value in vars(args).items() if value is not None}
    for name, other in SOURCES.items():
        for option in other.options:
            if name != args.source and option.keyword in given:
                raise DataError(f"{option.flag} belongs to the source {name}, not to {args.source}; leave it out")
    source = SOURCES[args.source]
    settings = {option.keyword: given[option.keyword] for option in source.options if option.keyword in given}
    if source.needs_on_bad:
        settings["on_bad"] = args.on_bad
    plan = source(args.input, splits=splits, seed=args.seed, **settings)
    return make_long_tailed(hold_out(plan, held_out, args.seed), args.long_tail, args.seed)
