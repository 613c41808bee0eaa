"""From a table to its runs: which there are, what each is trained with, and which of them share a beginning.

A run is an arm of a cell with a seed. Arms whose cross-entropy epochs have the same settings share these: a run of its
own trains them once, and each arm starts from its last checkpoint (`start_from`). Arms that differ in nothing that is
trained with, such as the protocol they are judged by, are one run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oat_dist.config import Config, load_config
from oat_dist.errors import ConfigError
from oat_dist.experiments.tables import PRETRAIN, Table
from oat_dist.files import sha256_bytes
from oat_dist.run_folder import flatten

__all__ = ["Options", "Plan", "PlannedRun", "folder_name", "make_plan", "scaled", "training_key"]

# What a run is trained with whatever it is called and wherever it and its data lie.
_PLACES = ("output_dir", "start_from", "data.path", "data.cache_dir", "data.workers", "data.prefetch", "engine.threads")
_PLACE_SECTIONS = ("job.", "log.", "checkpoint.")
_OURS = ("seed", "output_dir", "start_from", "data.eval_split", "job.outcome_file", "dry_run", "resume")
# What cross-entropy epochs do not know of. Not anchor.span: it decides who gets which samples of a batch.
_LATER = (
    *("anchor.center", "anchor.scope", "anchor.group_size", "anchor.grad", "anchor.floor", "anchor.momentum"),
    *("optim.oat_lr_scale", "epochs", "pretrain_epochs"),
)


@dataclass(frozen=True)
class Options:
    """What the command line says of the runs.

    Attributes:
        seeds: how many; None: as many as the table says.
        scale: epochs are multiplied by this.
        set: further overrides of every run.
        data: where packed sets lie, by the last part of the configuration's data.path; "" is any.
        defaults: overrides that anything else overrides.
    """

    seeds: int | None = None
    scale: float = 1.0
    set: tuple[str, ...] = ()
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One training. `overrides` are all that its configuration file is loaded with; `parent` trains its beginning."""

    name: str
    folder: Path
    config_path: Path
    overrides: tuple[str, ...]
    config: Config
    parent: PlannedRun | None = None

    @property
    def key(self) -> str:
        """A digest of what it is trained with; the run of another place has the same."""
        return training_key(self.config)


@dataclass(frozen=True)
class Plan:
    """Runs by (cell, arm, seed); several of these may have the same one. `problems` says why an arm has none."""

    table: Table
    folder: Path
    seeds: range
    runs: dict[tuple[str, str, int], PlannedRun]
    problems: dict[tuple[str, str], ConfigError]

    def chosen(self, cells: Sequence[str], arms: Sequence[str] | None) -> list[PlannedRun]:
        """The runs of some cells and arms (None: those compared there) in the order to train them, each once.

        Raises:
            ConfigError: one of them cannot be trained as the file says.
        """
        found: dict[Path, PlannedRun] = {}
        for cell in cells:
            names = self.table.arms_of(cell) if arms is None else arms
            for name in names:
                if (cell, name) in self.problems:
                    raise self.problems[cell, name]
            for seed in self.seeds:
                for name in names:
                    run = self.runs[cell, name, seed]
                    for one in (run.parent, run):
                        if one is not None:
                            found.setdefault(one.folder, one)
        return list(found.values())


def folder_name(table: str, options: Options) -> str:
    """Of a table under these options: what is trained otherwise lies apart."""
    name = table if options.scale == 1 else f"{table}-x{options.scale:g}"
    if options.set:
        text = "+".join(options.set)
        plain = re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,80}", text, re.ASCII)
        name += f"+{text}" if plain else f"+set-{sha256_bytes(text.encode())[:8]}"
    return name


def make_plan(table: Table, folder: Path, options: Options) -> Plan:
    """Plan every cell, arm and seed of a table, so that a run's folder depends on no selection.

    Raises:
        ConfigError: an option of the command line that cannot be.
    """
    seeds = range(options.seeds if options.seeds is not None else table.seeds)
    configs: dict[tuple[str, str], tuple[tuple[str, ...], Config]] = {}
    problems: dict[tuple[str, str], ConfigError] = {}
    sets: dict[tuple[str, str], str] = {}  # what the data set of each is called
    for cell in table.cells:
        for arm in table.arms:
            try:
                overrides, config, name = _configured(table, cell, arm, options)
            except ConfigError as error:
                problems[cell, arm] = error
                continue
            configs[cell, arm] = overrides, config
            sets[cell, arm] = name
    read = sorted(set(sets.values()))
    unused = [name for name in options.data if name and name not in read]
    if unused and read:
        raise ConfigError(f"--data {unused[0]}={options.data[unused[0]]}: this table reads {', '.join(read)}")
    shared = _shared(table, folder, configs, sets)
    first: dict[tuple[str, str], tuple[str, str]] = {}  # by data set too: a key does not know where data lie
    runs: dict[tuple[str, str, int], PlannedRun] = {}
    for (cell, arm), (overrides, config) in configs.items():
        home = first.setdefault((sets[cell, arm], training_key(config)), (cell, arm))
        beginning = shared.get((sets[cell, arm], _beginning(config)))
        for seed in seeds:
            parent = None if beginning is None else _seeded(*beginning, seed)
            own = (*overrides, *([] if parent is None else [f"start_from={parent.folder}"]))
            where = folder / home[0] / home[1], "/".join(home), table.config_of(cell)
            runs[cell, arm, seed] = (
                _seeded(*where, own, config, seed, parent) if home == (cell, arm) else runs[(*home, seed)]
            )
    return Plan(table, folder, seeds, runs, problems)


def _configured(table: Table, cell: str, arm: str, options: Options) -> tuple[tuple[str, ...], Config, str]:
    """The overrides of an arm in a cell, but for seed and place; what comes of them; what its data set is called."""
    path = table.config_of(cell)
    own = table.arms[arm].set
    for text in (*table.set, *table.cells[cell].set, *own, *options.set):
        if text.partition("=")[0] in _OURS:
            raise ConfigError(f"{text}: is not to be set here; it follows from table, seed and folder of a run")
    given = [*options.defaults, *table.set, *table.cells[cell].set, *own, *options.set]
    config = load_config(path, [*given, "output_dir=."])
    epochs, before = scaled(config.epochs, config.pretrain_epochs, options.scale)
    if table.arms[arm].phases == "pretrain":
        before = epochs
    split = table.select or table.test
    name = Path(config.data.path.rstrip("/")).name
    place = options.data.get(name, options.data.get("", config.data.path))
    given += [f"epochs={epochs}", f"pretrain_epochs={before}", f"data.eval_split={split}", f"data.path={place}"]
    data = dataclasses.replace(config.data, eval_split=split, path=place)
    return tuple(given), dataclasses.replace(config, epochs=epochs, pretrain_epochs=before, data=data), name


def scaled(epochs: int, before: int, scale: float) -> tuple[int, int]:
    """Epochs and cross-entropy epochs, multiplied: none of either phase stays none, some stay at least one."""
    first = 0 if before == 0 else max(1, round(before * scale))
    rest = 0 if before == epochs else max(1, round(epochs * scale) - first)
    return first + rest, first


def _shared(
    table: Table,
    folder: Path,
    configs: Mapping[tuple[str, str], tuple[tuple[str, ...], Config]],
    sets: Mapping[tuple[str, str], str],
) -> dict[tuple[str, str], tuple[Path, str, Path, tuple[str, ...], Config]]:
    """What trains the beginning of several runs, by data set and `_beginning`: all of `_seeded` but the seed."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    distinct: set[tuple[str, str]] = set()
    for where, (_, config) in configs.items():
        digest = sets[where], training_key(config)
        if digest not in distinct:  # the same run again shares nothing
            distinct.add(digest)
            groups.setdefault((sets[where], _beginning(config)), []).append(where)
    found, taken = {}, set()
    for key, members in groups.items():
        configured = [configs[where] for where in members]
        parts = any(config.pretrain_epochs < config.epochs for _, config in configured)
        if not key[1] or len(members) < 2 or not parts:
            continue
        cell, arm = members[0]
        place = PRETRAIN if (cell, PRETRAIN) not in taken else f"{PRETRAIN}-{arm}"
        taken.add((cell, place))
        count = min(config.pretrain_epochs for _, config in configured)
        overrides = (*configured[0][0], f"epochs={count}", f"pretrain_epochs={count}")
        config = dataclasses.replace(configured[0][1], epochs=count, pretrain_epochs=count)
        found[key] = (folder / cell / place, f"{cell}/{place}", table.config_of(cell), overrides, config)
    return found


def training_key(config: Config) -> str:
    """A digest of what a run of this configuration is trained with, wherever it and its data lie."""
    return _digest(_trained_with(config))


def _beginning(config: Config) -> str:
    """A digest of what the cross-entropy epochs of a run depend on; empty where they cannot be shared."""
    if config.pretrain_epochs == 0 or config.optim.schedule == "cosine":  # which knows its end from the start
        return ""
    values = _trained_with(config)
    return _digest({key: value for key, value in values.items() if key not in _LATER and not key.startswith("eval.")})


def _trained_with(config: Config) -> dict[str, Any]:
    """What differs from the defaults, so that a key which later versions add changes no digest."""
    usual = flatten(dataclasses.asdict(Config()))
    values = {key: value for key, value in flatten(dataclasses.asdict(config)).items() if value != usual[key]}
    values = {key: value for key, value in values.items() if key not in _PLACES}
    values = {key: value for key, value in values.items() if not key.startswith(_PLACE_SECTIONS)}
    if config.pretrain_epochs < config.epochs:
        return values
    rest = {key: value for key, value in values.items() if key not in _LATER and key != "eval.protocol"}
    return rest | {"epochs": config.epochs, "pretrain_epochs": config.pretrain_epochs}


def _digest(values: Mapping[str, Any]) -> str:
    return sha256_bytes(repr(sorted(values.items())).encode())


def _seeded(
    place: Path,
    name: str,
    config_path: Path,
    overrides: tuple[str, ...],
    config: Config,
    seed: int,
    parent: PlannedRun | None = None,
) -> PlannedRun:
    folder = place / str(seed)
    return PlannedRun(
        f"{name}/{seed}",
        folder,
        config_path,
        (*overrides, f"seed={seed}", f"output_dir={folder}"),
        dataclasses.replace(config, seed=seed, output_dir=str(folder)),
        parent,
    )
