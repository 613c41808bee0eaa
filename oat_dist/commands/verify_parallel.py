"""`verify-parallel`: whether N ranks train exactly as one process does, on the user's own configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oat_dist.config import Config, load_config, to_yaml
from oat_dist.config_checks import check_floor
from oat_dist.data_parts import open_splits
from oat_dist.engine.launcher import ENGINES, is_true
from oat_dist.engine.zero_config import read_settings, stage_of
from oat_dist.errors import ConfigError, LaunchError, OatError, run_command
from oat_dist.parallel_check.job import Job, check_config, plan_job, write_job
from oat_dist.parallel_check.processes import REFERENCE, Stage, run_stage
from oat_dist.parallel_check.verdict import (
    BOUND,
    CONTROL,
    FARTHER,
    Control,
    Row,
    bound_of,
    conclude,
    judge,
    judge_controls,
)
from oat_dist.stopping import sigterm_unwinds

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = f"""\
Check that N processes train your configuration exactly as one process would, before you trust a cluster.

A few optimizer steps are taken from the initial weights on the first global batches of your own plan: by one process
on the joined batch, with plain autograd on the textbook formulas, and by N ranks on every engine asked for, with and
without accumulation. Then everything is compared. Two wrong ways are tried besides; were they not noticed, the
agreement would prove nothing. One machine is enough, also for a cluster: start it with plain python inside an
allocation or outside; it starts its own ranks, one a GPU, or CPU processes. Nothing is written but --json.

What is checked is the arithmetic, so some things differ from training: fp32, SGD with your optim.lr and momentum
(whatever optim.name says), fixed BatchNorm statistics, no dropout, smooth activations. Notes above the table name
what applies. The joined batch must fit in one process; a smaller batch_size=... on the command line helps. $TMPDIR
must have room for a few copies of the weights.

columns:
  layout       how the global batch is cut; (configured) is yours
  ids          whether the ranks saw the samples of the plan, each once and in order
  anchors      largest difference of an anchor's entry
  loss         largest relative difference of the loss in a step
  gradient     the same of the gradient's norm
  parameters   |theta_N - theta_1| / |theta_1 - theta_0| after the last step
  collectives  ours in a step: one for each global anchor, else none
  verdict      ok when every difference is at most {BOUND:.0e}, or 5 times what rounding alone makes of it

Below them: what rounding alone does (one process, the same sums in another order), and two wrong ways. They are
noticed when their parameters are off by {CONTROL:.0e} and by {FARTHER} times as much as in any row, or their anchors by
{FARTHER} times as much.

Exit status: 0 when every row is ok and every control is noticed, 1 when not, 2 when it could not be checked.
"""

_EXAMPLES = """\
examples:
  oat-dist verify-parallel configs/quickstart.yaml
  oat-dist verify-parallel CONFIG --engines ddp,zero2,zero3 --processes 4
  oat-dist verify-parallel CONFIG --cpu batch_size=16 anchor.span=step --json check.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key of the file")
    parser.add_argument(
        "--engines", metavar="NAMES", help=f"some of {','.join(ENGINES)}, by commas (default: the config's engine)"
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, help="ranks (default: engine.processes, else one a GPU, else 2)"
    )
    parser.add_argument("--steps", metavar="K", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU, also where there are GPUs")
    parser.add_argument(
        "--timeout-minutes", metavar="M", type=float, default=30.0, help="give up after this long (default 30)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to this file, too")


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    given = load_config(arguments.config, arguments.overrides)
    config, notes = check_config(given)
    cpu = arguments.cpu or not torch.cuda.is_available() or is_true("ACCELERATE_USE_CPU")
    processes = _processes(arguments.processes, given, cpu)
    engines = _engines(arguments.engines, given)
    if arguments.steps < 1 or not arguments.timeout_minutes > 0:
        raise OatError("--steps must be at least 1, --timeout-minutes above 0")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise OatError(f"{arguments.json}: no such folder to write to")
    train_set, _ = open_splits(config.data)
    check_floor(config, len(train_set.classes))
    job, remarks = plan_job(config, train_set.num_samples, processes, arguments.steps)
    deadline = started + 60 * arguments.timeout_minutes
    with tempfile.TemporaryDirectory(prefix="oat-verify-parallel-") as name, sigterm_unwinds():
        folder = Path(name)
        (folder / "config.yaml").write_text(to_yaml(config))
        write_job(folder, job)
        _say(f"reference: 1 process, {len(job.batches)} steps on joined batches of {config.batch_size} ...")
        [reference] = run_stage(Stage(REFERENCE, "ddp", 1), folder, cpu, deadline)
        rows: list[Row] = []
        found: dict[str, list[dict[str, Any]]] = {}  # by engine and rank
        for number, engine in enumerate(engines):
            also = " and controls" if number == 0 else ""
            _say(f"{engine}: {processes} ranks, {len(job.cases)} layout(s){also} ...")
            stage = Stage(engine, engine, processes, _settings(engine, given, folder), controls=number == 0)
            found[engine] = run_stage(stage, folder, cpu, deadline)
            rows += judge(job, engine, reference, found[engine])
    controls = judge_controls(job, engines[0], reference, found[engines[0]], rows)
    notes += [*reference["notes"], *remarks]
    ok, text = conclude(rows, controls, reference["rounding"])
    _print(arguments.config, config, job, reference, notes, rows, controls)
    print(f"\n{text}  ({time.monotonic() - started:.0f} s)")
    if arguments.json is not None:
        record = {
            "ok": ok,
            "verdict": text,
            "config": str(arguments.config),
            "overrides": list(arguments.overrides),
            "processes": processes,
            "device": reference["device"],
            "steps": len(job.batches),
            "bound": bound_of(reference),
            "control_bound": CONTROL,
            "rounding": reference["rounding"],
            "notes": notes,
            "rows": [dataclasses.asdict(row) for row in rows],
            "controls": [dataclasses.asdict(control) for control in controls],
        }
        arguments.json.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    return 0 if ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify-parallel")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))


def _processes(asked: int | None, config: Config, cpu: bool) -> int:
    """How many ranks.

    Raises:
        LaunchError: fewer than two, more than there are GPUs, or a launcher that has started several of us.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError("verify-parallel starts its own ranks; start it with plain python, not with a launcher")
    gpus = 0 if cpu else torch.cuda.device_count()
    processes = asked or config.engine.processes or gpus or 2
    if not cpu and processes > gpus:
        raise LaunchError(f"{processes} ranks need {processes} GPUs, and there are {gpus}; use fewer, or --cpu")
    if processes < 2 or (asked is not None and asked < 2):
        raise LaunchError("one rank is no parallel run; use --processes 2 or more" + ("" if cpu else ", with --cpu"))
    return processes


def _engines(asked: str | None, config: Config) -> list[str]:
    """Which engines, each once.

    Raises:
        ConfigError: an unknown name, or a DeepSpeed file of another stage than engine.name.
    """
    own = config.engine.name
    if config.engine.deepspeed is not None:
        stage = f"zero{stage_of(read_settings(Path(config.engine.deepspeed)), config.engine.deepspeed)}"
        if own not in (None, stage):
            raise ConfigError(f"engine.name={own}, but engine.deepspeed={config.engine.deepspeed} says {stage}")
        own = stage
    engines = list(dict.fromkeys((asked or own or "ddp").split(",")))
    for engine in engines:
        if engine not in ENGINES:
            raise ConfigError(f"--engines {asked}: {engine!r} is none of {', '.join(ENGINES)}")
    return engines


def _settings(engine: str, config: Config, folder: Path) -> str | None:
    """The DeepSpeed file of an engine: the user's where it is of that stage."""
    if engine == "ddp":
        return None
    stage = int(engine.removeprefix("zero"))
    own = config.engine.deepspeed
    if own is not None and stage_of(read_settings(Path(own)), own) == stage:
        return own
    if stage != 3:
        return None
    # Small parameters would stay whole on every rank: gathering them is what is to be checked.
    path = folder / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(
    name: str,
    config: Config,
    job: Job,
    reference: dict[str, Any],
    notes: Sequence[str],
    rows: Sequence[Row],
    controls: Sequence[Control],
) -> None:
    anchor = config.anchor
    what = "cross-entropy"
    if job.objective == "oat":
        what = f"OAT, center {anchor.center}, scope {anchor.scope}, span {anchor.span}"
    print(
        f"{name}: {job.processes} ranks on {reference['device']} against one process, {len(job.batches)} SGD steps of "
        f"{config.batch_size} samples, fp32\n{config.model.name}, {what}"
    )
    for note in notes:
        print(f"note: {note}")
    print()
    table = [["engine", "layout", "ids", "anchors", "loss", "gradient", "parameters", "collectives", "verdict"]]
    for row in rows:
        numbers = map(_number, (row.anchors, row.loss, row.gradient, row.parameters))
        name = f"{row.layout} (configured)" if row.configured else row.layout
        ids, verdict = "equal" if row.ids else "differ", "FAIL" if row.faults else "ok"
        table.append([row.engine, name, ids, *numbers, str(row.collectives), verdict])
    table.append(["", "rounding alone", "", "", "", "", _number(reference["rounding"]), "", ""])
    for control in controls:
        differences = (_number(control.anchors), "", "", _number(control.parameters))
        noticed = "noticed" if control.noticed else "TOO WEAK"
        table.append([control.engine, f"wrong: {control.what}", "", *differences, "", noticed])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        sized = [
            cell.rjust(width) if 3 <= number < 8 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(sized).rstrip())
    for row in rows:
        for fault in row.faults:
            print(f"{row.engine}, {row.layout}: {fault}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
