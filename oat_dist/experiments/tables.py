"""Files that say what is compared: cells (what is trained) times arms (how), as overrides of a run's configuration.

Those of the paper lie in ``configs/paper``, studies in ``configs/studies``; docs/reproduce.md explains every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oat_dist
from oat_dist.errors import ConfigError
from oat_dist.strict_yaml import read_yaml

__all__ = ["MEASURES", "PRETRAIN", "Arm", "Cell", "Table", "find_table", "read_table", "repository", "table_names"]

FOLDERS = ("configs/paper", "configs/studies")
PHASES = ("oat", "pretrain")
MEASURES = ("accuracy", "balanced")
# Under which an arm can be judged, by its phases. Whether `balanced` and `ordinary` are there depends on the data.
PROTOCOLS = {
    "oat": ("argmax", "batch", "single", "dataset", "stored", "balanced", "ordinary"),
    "pretrain": ("argmax", "balanced", "ordinary"),
}
PRETRAIN = "pretrain"  # the folder of the epochs that arms share
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}", re.ASCII)  # names become folders


@dataclass(frozen=True)
class Arm:
    """How a network is trained.

    Attributes:
        title: what tables call it.
        phases: oat: as the configuration says; pretrain: cross-entropy all along.
        protocol: of its accuracy; None: argmax, or eval.protocol for a network with anchors.
        control: left out where nobody asks for it.
        set: overrides, ``key=value``.
    """

    title: str
    phases: str = "oat"
    protocol: str | None = None
    control: bool = False
    set: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """What is trained.

    Attributes:
        title: what tables call it.
        config: None: the table's.
        set: overrides, ``key=value``, before those of the arm.
        arms: those compared here unless others are asked for; None: all but controls.
        paper: the paper's percentages by arm; None: the paper has no such cell.
        paper_epoch_seconds, paper_test_seconds: the paper's times by arm.
    """

    title: str
    config: str | None = None
    set: list[str] = field(default_factory=list)
    arms: list[str] | None = None
    paper: dict[str, float] | None = None
    paper_epoch_seconds: dict[str, float] = field(default_factory=dict)
    paper_test_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        title, about: what it is and what it shows.
        config: of the runs, relative to the repository.
        set: overrides of every run, before those of the cell.
        select: the split that chooses the best epoch, held out of training; None: only the last epoch is reported.
        test: the split whose accuracies are reported.
        seeds: how many, unless another number is asked for.
        measure: accuracy, or balanced: the mean over classes of the accuracy of each.
        arms, cells: by name.
        baseline: the arm that the others are compared with.
        compare: further comparisons: the arms that an arm is compared with besides.
        gallery: the arm whose images right against the baseline are shown; None: none are.
        differs: in what it is not the paper's experiment.
    """

    title: str
    arms: dict[str, Arm]
    baseline: str
    cells: dict[str, Cell]
    about: str = ""
    config: str | None = None
    set: list[str] = field(default_factory=list)
    select: str | None = None
    test: str = "test"
    seeds: int = 5
    measure: str = "accuracy"
    gallery: str | None = None
    compare: dict[str, list[str]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)

    def config_of(self, cell: str) -> Path:
        """The configuration file of a cell."""
        name = self.cells[cell].config or self.config
        assert name is not None
        return repository() / name

    def arms_of(self, cell: str) -> list[str]:
        """The arms compared in a cell unless others are asked for."""
        chosen = self.cells[cell].arms
        return [name for name in self.arms if (name in chosen if chosen else not self.arms[name].control)]


def repository() -> Path:
    """Where configs/ and launch/ lie: beside the package, or here for an installed one."""
    beside = Path(oat_dist.__file__).parent.parent
    return beside if (beside / FOLDERS[0]).is_dir() else Path()


def table_names() -> dict[str, Path]:
    """Every table and study by name."""
    return {path.stem: path for folder in FOLDERS for path in sorted((repository() / folder).glob("*.yaml"))}


def find_table(name: str) -> Path:
    """The file of a table, by name or path.

    Raises:
        ConfigError: there is none; the names are listed.
    """
    known = table_names()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"{name}: no such table; {hint}There are {', '.join(known)}, or give a FILE.yaml")


def read_table(path: Path) -> Table:
    """Read and check the file of a table.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type, a name that cannot be a folder, arms that
            there are not.
    """
    table: Table = _section(Table, read_yaml(path, "table"), str(path), "")
    for kind, names in (("arm", table.arms), ("cell", table.cells)):
        if not names:
            raise ConfigError(f"{path}: {kind}s is empty; name at least one")
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{path}: {kind} {name!r} becomes a folder: use letters, digits, _, . and -")
    if PRETRAIN in {name.partition("-")[0] for name in table.arms}:
        raise ConfigError(f"{path}: an arm cannot be called {PRETRAIN}: the epochs that arms share lie there")
    _one_of(f"{path}: measure", table.measure, MEASURES)
    for name, arm in table.arms.items():
        _one_of(f"{path}: arms.{name}.phases", arm.phases, PHASES)
        if arm.protocol is not None:
            _one_of(f"{path}: arms.{name}.protocol", arm.protocol, PROTOCOLS[arm.phases])
    named = {"baseline": [table.baseline], "gallery": [table.gallery] if table.gallery else []}
    named["compare"] = [*table.compare, *(other for others in table.compare.values() for other in others)]
    for name, cell in table.cells.items():
        if cell.config is None and table.config is None:
            raise ConfigError(f"{path}: cell {name} has no config, and neither has the table")
        named[f"cells.{name}.arms"] = cell.arms or []
        for key in ("paper", "paper_epoch_seconds", "paper_test_seconds"):
            named[f"cells.{name}.{key}"] = list(getattr(cell, key) or ())
    for where, arms in named.items():
        for arm_name in arms:
            _one_of(f"{path}: {where}", arm_name, list(table.arms))
    if table.select == table.test:
        raise ConfigError(
            f"{path}: select={table.select} would choose the best epoch on the very split it is judged on"
        )
    if table.seeds < 1:
        raise ConfigError(f"{path}: seeds must be at least 1, not {table.seeds}")
    return table


def _section(kind: Any, values: Mapping[Any, Any], where: str, prefix: str) -> Any:
    """`values` as a dataclass, strictly."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}; {hint}")
    for name, item in fields.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and values.get(name) is None:
            raise ConfigError(f"{where}: {prefix}{name} is missing")
    return kind(**{key: _value(hints[key], value, where, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        inner, none = typing.get_args(hint)
        assert none is type(None)
        return None if value is None else _value(inner, value, where, name)
    wanted = ""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _section(hint, value, where, f"{name}.")
        wanted = "a section with keys of its own"
    elif typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        if isinstance(value, dict):
            return {str(key): _value(kind, item, where, f"{name}.{key}") for key, item in value.items()}
        wanted = "a mapping of names"
    elif typing.get_origin(hint) is list:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return list(value)
        wanted = "a list of texts, such as [optim.lr=0.01]"
    elif isinstance(value, str):
        read: dict[Any, Any] = {
            str: str,
            int: int,
            float: float,
            bool: lambda text: {"true": True, "false": False}[text.lower()],
        }
        try:
            return read[hint](value)
        except (ValueError, KeyError):
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[hint]
    raise ConfigError(f"{where}: {name} is {wanted or 'a text'}, not {value!r}")


def _one_of(where: str, value: str, choices: typing.Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}{hint}")
