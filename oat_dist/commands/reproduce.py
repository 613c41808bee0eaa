"""``reproduce TABLE``: trains what a table of experiments lacks, and writes it with means and intervals over seeds."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from oat_dist.commands.arguments import positive
from oat_dist.errors import ConfigError, run_command
from oat_dist.experiments.plan import Options, folder_name, make_plan
from oat_dist.experiments.pool import Machine
from oat_dist.experiments.tables import find_table, read_table, table_names

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Run the experiments of a table: the paper's (configs/paper) or a study (configs/studies). Each run is a training of its
own, in a folder of its own. What is missing is trained, what was interrupted goes on, what is done is not touched; so
the same command may be given any number of times. The table is written as Markdown, CSV, JSON and one HTML page, with
means and 95 % intervals over seeds beside the paper's numbers.
"""

_EXAMPLES = """\
examples:
  oat-dist reproduce --list
  oat-dist reproduce table4 --only lightweight --seeds 5
  oat-dist reproduce table4 --only lightweight --seeds 2 --epochs-scale 0.1 --data packed/cifar10-holdout
  oat-dist reproduce table1 --arms cross_entropy,oat,uniform
  oat-dist reproduce table4 --set optim.ema=0.999        results of their own, apart
  oat-dist reproduce table5 --launch "accelerate launch --config_file configs/accelerate/gpus.yaml"
  oat-dist reproduce table5 --slurm --slurm-options="--gpus-per-node=1 --time=8:00:00"

docs/reproduce.md says what the numbers mean and how to write a table of your own.
"""


_MOST = 1000  # times the epochs of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what")
    what.add_argument("table", metavar="TABLE", nargs="?", help="its name (see --list), or a FILE.yaml")
    what.add_argument("--only", metavar="CELL", nargs="+", action="extend", help="these cells alone")
    what.add_argument("--arms", metavar="A,B", help="compare these, controls too; all: every one of the table")
    what.add_argument("--seeds", metavar="N", type=positive, help="seeds 0 to N - 1 (default: as the table says)")
    what.add_argument("--epochs-scale", metavar="X", type=_scale, default=1.0, help="multiply all epochs, e.g. 0.1")
    what.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", help="override a key in every run")
    what.add_argument(
        "--data",
        metavar="[NAME=]PLACE",
        nargs="+",
        action="extend",
        help="where a packed set lies; NAME: last part of data.path",
    )
    what.add_argument("--output", metavar="DIR", type=Path, default=Path("results"), help="(default results)")
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", metavar="J", type=positive, help="runs at a time (default: GPUs, else cores)")
    how.add_argument("--launch", metavar="COMMAND", help="starts each run, e.g. accelerate launch on several GPUs")
    how.add_argument("--slurm", action="store_true", help="submit what is missing as array jobs, and return")
    how.add_argument("--slurm-options", metavar="TEXT", default="", help="further options of sbatch")
    how.add_argument("--list", action="store_true", help="list the tables, or what is in TABLE")
    how.add_argument("--dry-run", action="store_true", help="say what would be run")


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most {_MOST:,}")
    return value


def run(arguments: argparse.Namespace) -> int:
    if arguments.list or arguments.table is None:
        if arguments.table is None and not arguments.list:
            raise ConfigError("name a table; oat-dist reproduce --list lists them")
        paths = table_names().values() if arguments.table is None else [find_table(arguments.table)]
        print("\n\n".join(_listed(path) for path in paths))
        return 0
    path = find_table(arguments.table)
    table = read_table(path)
    cells = _chosen("--only", arguments.only, list(table.cells)) or list(table.cells)
    arms = None if arguments.arms is None else _chosen("--arms", arguments.arms.split(","), list(table.arms))
    machine = Machine(1) if arguments.slurm else _machine(arguments)
    options = Options(
        seeds=arguments.seeds,
        scale=arguments.epochs_scale,
        set=tuple(arguments.set or ()),
        data=_places(arguments.data or (), table_data=path),
        # A run of one thread is the same whatever runs beside it; on a GPU or under a launcher that is not ours to say.
        defaults=("checkpoint.keep=1", *(["engine.threads=1"] if machine.one_thread and not arguments.slurm else [])),
    )
    plan = make_plan(table, arguments.output / folder_name(path.stem, options), options)
    # Imported here: torch and matplotlib take seconds, which refusals and --list need not wait for.
    from oat_dist.experiments.reproduce import Request, describe, reproduce, unfinished

    request = Request(plan, options, cells, arms, machine, _command(arguments))
    if arguments.slurm:
        from oat_dist.experiments.slurm import submit

        submit(unfinished(request), plan.folder / "slurm", shlex.split(arguments.slurm_options), arguments.dry_run)
        print(f"when they have ended, this writes the table:\n{_command(arguments)}")
        return 0
    if arguments.dry_run:
        print(describe(request))
        return 0
    from oat_dist.stopping import StopRequests, signal_numbers

    requests = StopRequests(signal_numbers(["INT", "TERM"]))
    with requests.listening():
        failed = reproduce(request, requests)
    print(plan.folder / "table.md")
    for name, why in failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    if requests.heard is not None:
        print(f"stopped; the same command goes on from there:\n{_command(arguments)}", file=sys.stderr)
        return 128 + requests.heard
    return 2 if failed else 0


def _listed(path: Path) -> str:
    table = read_table(path)
    seeds = table.seeds
    lines = [f"{path.stem}: {table.title}"]
    runs = 0
    for name, cell in table.cells.items():
        arms = table.arms_of(name)
        runs += seeds * len(arms)
        lines.append(f"  {name:<16} {cell.title}: {', '.join(arms)}")
    lines[0] += f" ({runs} results of {seeds} seeds)"
    controls = [name for name, arm in table.arms.items() if arm.control]
    return "\n".join([*lines, *([f"  --arms also takes {', '.join(controls)}"] if controls else [])])


def _chosen(option: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Names in the order of the file."""
    names = [name for text in given or () for name in text.split(",") if name]
    if given is not None and not names:
        raise ConfigError(f"{option} names nothing; there are {', '.join(known)}")
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{option} {name}: there are {', '.join(known)}{hint}")
    return [name for name in known if name in names]


def _places(given: Sequence[str], table_data: Path) -> dict[str, str]:
    """``NAME=PLACE`` or, for any name, ``PLACE``."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or "/" in name:
            name, place = "", text
        if name in found or not place:
            raise ConfigError(f"--data {text}: give one PLACE, or NAME=PLACE for each set")
        found[name] = place
    return found


def _machine(arguments: argparse.Namespace) -> Machine:
    if arguments.launch is not None:
        launch = tuple(shlex.split(arguments.launch))
        if not launch:
            raise ConfigError("--launch is empty; name a command, such as accelerate launch --config_file FILE")
        return Machine(arguments.jobs or 1, launch=launch, one_thread=False)
    gpus = _gpus()
    if gpus:
        return Machine(arguments.jobs or len(gpus), gpus, one_thread=False)
    allowed = len(os.sched_getaffinity(0))
    return Machine(arguments.jobs or min(allowed, psutil.cpu_count(logical=False) or allowed))


def _gpus() -> tuple[str, ...]:
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available():
        return ()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named) or tuple(map(str, range(torch.cuda.device_count())))


def _command(arguments: argparse.Namespace) -> str:
    """What makes this table, wherever and however many at a time its runs are trained."""
    words = ["oat-dist", "reproduce", arguments.table]
    words += ["--only", *arguments.only] if arguments.only else []
    words += ["--arms", arguments.arms] if arguments.arms else []
    words += ["--seeds", str(arguments.seeds)] if arguments.seeds else []
    words += ["--epochs-scale", f"{arguments.epochs_scale:g}"] if arguments.epochs_scale != 1 else []
    words += ["--set", *arguments.set] if arguments.set else []
    words += ["--data", *arguments.data] if arguments.data else []
    words += ["--output", str(arguments.output)] if arguments.output != Path("results") else []
    words += ["--launch", arguments.launch] if arguments.launch else []
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="oat-dist reproduce")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))
