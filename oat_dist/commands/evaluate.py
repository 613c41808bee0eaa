"""``evaluate RUN``: the accuracy of a checkpoint under every protocol, the same on any number of ranks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from oat_dist.checkpoint import Checkpoint, find_checkpoint
from oat_dist.data.images.transforms import Normalise
from oat_dist.data_parts import open_location
from oat_dist.distributed import World
from oat_dist.engine import start_engine
from oat_dist.engine.launcher import is_true
from oat_dist.errors import DataError, LaunchError, OatError, run_command
from oat_dist.evaluate import PROTOCOLS, Evaluation
from oat_dist.predict import load_network, pipeline_of
from oat_dist.run_folder import read_config
from oat_dist.validation import evaluate_network

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Evaluate a trained checkpoint under the protocols of OAT:

  batch    32 samples of a seeded permutation share an anchor (the paper's)
  single   each sample is its own anchor set
  dataset  one anchor for the whole split
  stored   the mean training anchor: one image in, one answer out
  argmax   the largest output (a network trained with cross-entropy alone)

Predicted labels do not depend on the number of processes or on --batch-size. The network runs in fp32, also one that
was trained in bf16.

examples:
  python launch/evaluate.py runs/quickstart
  accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/evaluate.py runs/quickstart --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or one of its checkpoints/step-<n> folders")
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or step-<n>")
    parser.add_argument("--protocol", action="append", choices=[*PROTOCOLS, "argmax"], help="only this one; repeatable")
    parser.add_argument("--data", help="packed data set, a folder or URL; default: the one the run trained on")
    parser.add_argument("--split", help="split to evaluate on; default: the run's data.eval_split")
    parser.add_argument("--batch-size", type=int, default=256, help="forward batch of each process (default 256)")
    parser.add_argument("--seed", type=int, help="protocol batch: seed of the groups (default: the run's eval.seed)")
    parser.add_argument("--group-size", type=int, help="protocol batch: samples of a group (default: the run's)")
    parser.add_argument("--predictions", type=Path, help="write id, label and prediction of every sample to this CSV")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def chosen_checkpoint(run: Path, name: str | None) -> Checkpoint:
    """The checkpoint that RUN and ``--checkpoint`` name; `name` may be latest, best or step-<n>."""
    if name is None or name == "latest":
        return find_checkpoint(run)
    if name == "best":
        path = run / "checkpoints" / "best"
        try:
            name = path.read_text().strip()
        except FileNotFoundError:
            raise OatError(f"{path}: this run has no best checkpoint yet; use --checkpoint latest") from None
    if not name.startswith("step-"):
        raise OatError(f"--checkpoint {name}: must be latest, best or step-<n>")
    return find_checkpoint(run / "checkpoints" / name)


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1 or (arguments.group_size is not None and arguments.group_size < 1):
        raise OatError("--batch-size and --group-size must be at least 1")
    if arguments.predictions is not None and not arguments.predictions.parent.is_dir():
        raise OatError(f"{arguments.predictions}: no such folder to write to")
    if is_true("ACCELERATE_USE_DEEPSPEED"):
        raise LaunchError(
            "evaluation runs without DeepSpeed: start it with plain python, or with cpu-2.yaml or gpus.yaml of "
            "configs/accelerate/"
        )
    engine = start_engine(name="ddp")
    with engine.peers():
        evaluation, facts = _evaluate(arguments, engine.world)
    if evaluation is not None:
        _report(arguments, evaluation, facts)
    engine.close()
    return 0


def _evaluate(arguments: argparse.Namespace, world: World) -> tuple[Evaluation | None, dict[str, object]]:
    checkpoint = world.together(chosen_checkpoint, arguments.run, arguments.checkpoint)
    run_folder = checkpoint.folder.parent.parent
    grouping, cache = {"seed": 0, "group_size": 32}, {}
    try:
        config = world.together(read_config, run_folder)
        arguments.data = arguments.data or config["data"]["path"]
        cache = {key: config["data"].get(key) for key in ("cache_dir", "cache_gb")}
        arguments.split = arguments.split or config["data"]["eval_split"]
        grouping |= {key: config["eval"][key] for key in grouping if key in config.get("eval", {})}
    except OatError as error:  # a checkpoint on its own will do where the command line says what it lacks
        if arguments.data is None or arguments.split is None:
            raise
        if world.is_main and (arguments.seed is None or arguments.group_size is None):
            print(f"note: {error}; protocol batch uses seed 0 and groups of 32", file=sys.stderr)
    seed = grouping["seed"] if arguments.seed is None else arguments.seed
    group_size = grouping["group_size"] if arguments.group_size is None else arguments.group_size
    if arguments.split is None:
        raise OatError(f"{run_folder}: the run has no data.eval_split; name one with --split")
    network, card, stored_anchor_C = load_network(checkpoint)
    _check_protocols(arguments.protocol, PROTOCOLS if card["objective"] == "oat" else ("argmax",))
    shards = world.together(partial(open_location, **cache), arguments.data, arguments.split)
    if shards.classes != card["classes"]:
        raise DataError(f"{shards.where}: its classes are not the {len(card['classes'])} classes of the checkpoint")
    network.to(world.device)
    evaluation = evaluate_network(
        network,
        shards,
        Normalise(card["mean"], card["std"], world.device),
        world,
        pipeline=pipeline_of(card),
        center=card["center"] if card["objective"] == "oat" else None,
        floor=card["floor"],
        stored_anchor_C=stored_anchor_C,
        batch_size=arguments.batch_size,
        group_size=group_size,
        seed=seed,
    )
    facts = {
        "checkpoint": str(checkpoint.folder),
        "split": arguments.split,
        "seed": seed,
        "group_size": group_size,
        "undecodable": 0 if evaluation is None else shards.num_samples - len(evaluation.labels_N),
    }
    return evaluation, facts


def _check_protocols(asked: Sequence[str] | None, there: Sequence[str]) -> None:
    """Before the forward pass, not after it."""
    for name in asked or ():
        if name not in there:
            raise OatError(f"protocol {name} does not apply to this checkpoint; it has {', '.join(there)}")


def _report(arguments: argparse.Namespace, evaluation: Evaluation, facts: dict[str, object]) -> None:
    names = arguments.protocol or list(evaluation.protocols)
    if arguments.predictions is not None:
        _write_predictions(arguments.predictions, evaluation, names)
    if arguments.json:
        protocols = {
            name: {"accuracy": result.accuracy, "correct": result.correct, "total": result.total, "ties": result.ties}
            for name, result in evaluation.protocols.items()
            if name in names
        }
        print(json.dumps({**facts, "protocols": protocols}, indent=1))
        return
    print(f"{facts['checkpoint']} on {facts['split']}")
    print(f"{'protocol':<10} {'accuracy':>9} {'correct':>9} {'samples':>9} {'ties':>6}")
    for name in names:
        result = evaluation.protocols[name]
        print(f"{name:<10} {result.accuracy:>9.3%} {result.correct:>9,} {result.total:>9,} {len(result.ties):>6}")
    if facts["undecodable"]:
        print(f"{facts['undecodable']} undecodable sample(s) left out; list them with shards/verify.py")


def _write_predictions(path: Path, evaluation: Evaluation, names: list[str]) -> None:
    lines = [",".join(["id", "label", *names])]
    columns = [evaluation.ids_N, evaluation.labels_N, *(evaluation.protocols[name].predicted_N for name in names)]
    lines += [",".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]
    try:
        path.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise OatError(f"{path}: cannot be written ({error.strerror})") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
