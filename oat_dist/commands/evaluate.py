"""``evaluate RUN``: how good a checkpoint is on a split, under every protocol; on one process or several."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oat_dist.anchor import invert
from oat_dist.answers import probabilities_of, temperable
from oat_dist.calibration import Calibration, calibrate, prior_key, read_calibration, write_temperature
from oat_dist.commands.arguments import positive
from oat_dist.commands.evaluation_output import Found, show
from oat_dist.commands.evaluation_subject import Subject
from oat_dist.data.index import ShardSet
from oat_dist.data.progress import show_progress
from oat_dist.distributed import World
from oat_dist.engine import start_engine
from oat_dist.engine.launcher import is_true
from oat_dist.errors import DataError, LaunchError, OatError, run_command
from oat_dist.evaluate import PRIOR_PROTOCOLS, PROTOCOLS, Outputs
from oat_dist.evaluation_files import write_evaluation
from oat_dist.priors import anchor_for
from oat_dist.results import Evaluation
from oat_dist.validation import network_outputs

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Evaluate a trained checkpoint under the protocols of OAT:

  batch     32 samples of a seeded permutation share an anchor (the paper's)
  single    each sample is its own anchor set
  dataset   one anchor for the whole split
  stored    the mean training anchor: one image in, one answer out
  argmax    the largest output (a network trained with cross-entropy alone)
under another class prior than that of training (where its classes are not equally frequent; center "prior"):
  balanced  every class is equally likely at test time
  ordinary  as likely as in training, for a network trained to balance them (loss.logit_adjustment, class_weights)
  given     the class prior of --prior (center "prior")

Of each: accuracy and balanced accuracy with their 95 % bootstrap intervals, top-5, Brier score; in the JSON also
accuracy by class and the confusion matrix. Predicted labels do not depend on the number of processes or on
--batch-size. The network runs in fp32, also one that was trained in bf16.
"""

_EXAMPLES = """\
examples:
  python launch/evaluate.py runs/quickstart
  accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/evaluate.py runs/quickstart --json
  oat-dist evaluate runs/oat --against runs/cross-entropy          is one better? McNemar's exact test
  oat-dist evaluate runs/oat --split val --fit-temperature         calibrate; then predict --calibrated
  oat-dist evaluate runs/prior --prior balanced                    another class prior at test time
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    every = [*PROTOCOLS, *PRIOR_PROTOCOLS, "ordinary", "argmax"]
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("run", metavar="RUN", type=Path, help="run folder, or one of its checkpoints/step-<n> folders")
    what.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or step-<n>")
    what.add_argument("--data", help="packed data set, a folder or URL; default: the one the run trained on")
    what.add_argument("--split", help="split to evaluate on; default: the run's data.eval_split")
    what.add_argument("--against", metavar="RUN2", type=Path, help="compare with this run on the same samples, paired")
    how = parser.add_argument_group("how")
    how.add_argument("--protocol", action="append", choices=every, help="show only this one; repeatable")
    how.add_argument("--batch-size", type=positive, default=256, help="forward batch of each process (default 256)")
    how.add_argument("--seed", type=int, help="protocol batch: seed of the groups (default: the run's eval.seed)")
    how.add_argument("--seeds", type=positive, default=5, help="protocol batch: spread over so many seeds (default 5)")
    how.add_argument("--group-size", type=positive, help="protocol batch: samples of a group (default: the run's)")
    how.add_argument(
        "--prior",
        default="training",
        help='center "prior" only, the class prior at test time: training, balanced, class=share,..., or FILE.json',
    )
    calibrated = how.add_mutually_exclusive_group()
    calibrated.add_argument(
        "--calibrated", action="store_true", help="probabilities with the temperature fitted before"
    )
    calibrated.add_argument(
        "--fit-temperature", action="store_true", help="fit a temperature on this split (held-out data) and keep it"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    out.add_argument("--output", metavar="FILE", type=Path, help="write that JSON object to this file, too")
    out.add_argument("--predictions", metavar="FILE", type=Path, help="id, label and predictions of every sample, CSV")
    out.add_argument("--save", action="store_true", help="make it the evaluation of the run folder, for its report")


def run(arguments: argparse.Namespace) -> int:
    for path in filter(None, (arguments.predictions, arguments.output)):
        if not path.parent.is_dir():
            raise OatError(f"{path}: no such folder to write to")
        if path.is_dir():
            raise OatError(f"{path}: a folder; name a file to write")
    if arguments.predictions is not None and arguments.predictions == arguments.output:
        raise OatError(f"{arguments.output}: --output and --predictions would overwrite each other; name two files")
    if is_true("ACCELERATE_USE_DEEPSPEED"):
        raise LaunchError(
            "evaluation runs without DeepSpeed: start it with plain python, or with cpu-2.yaml or gpus.yaml of "
            "configs/accelerate/"
        )
    engine = start_engine(name="ddp")
    with engine.peers(), engine.memory(f"lower --batch-size={arguments.batch_size}; it changes no answer"):
        found = _evaluate(arguments, engine.world)
    if found is not None:
        show(arguments, found)
        if found.fit_problem is not None:
            raise OatError(f"--fit-temperature: {found.fit_problem}")
    engine.close()
    return 0


def _evaluate(arguments: argparse.Namespace, world: World) -> Found | None:
    """What there is to say, on rank 0."""
    subject = Subject.load(arguments.run, arguments.checkpoint, arguments, world)
    other = (
        None if arguments.against is None else Subject.load(arguments.against, None, arguments, world, data_of=subject)
    )
    protocols = subject.protocols(given=arguments.prior not in ("training", "balanced"))
    for name in arguments.protocol or ():  # before the forward pass, not after it
        if name not in protocols:
            raise OatError(f"protocol {name} does not apply to this checkpoint; it has {', '.join(protocols)}")
    answering = _answering(subject, arguments.prior)
    prior_C = world.together(_prior, subject, arguments.prior)
    key = prior_key(arguments.prior, prior_C)
    temperatures, facts = {}, subject.facts() | {"prior": arguments.prior, "calibrated": arguments.calibrated}
    if arguments.calibrated:
        kept = world.together(read_calibration, subject.checkpoint, key)
        temperatures[answering] = float(kept["temperature"])
        facts |= {"calibrated_protocol": answering, "calibrated_on": kept["split"]}
    shards = subject.open_split(world)
    if arguments.fit_temperature and shards.digest == world.together(lambda: subject.train_digest):
        raise OatError(
            f"--fit-temperature on split {subject.split}, which the run trained on: a temperature is fitted on "
            "held-out data; name another with --split (pack one: shards/pack.py ... --split train=0.9 --split val=0.1)"
        )
    if other is not None:
        other.check_pair(subject)
    outputs = _forward(subject, shards, arguments.batch_size, world)
    other_outputs = None if other is None else _forward(other, shards, arguments.batch_size, world)

    def on_main() -> Found | None:
        if outputs is None:
            return None
        evaluation = subject.judge(outputs, arguments.seeds, prior_C, temperatures)
        reference = None
        if other is not None and other_outputs is not None:
            reference = (other, other.judge(other_outputs, 0, None, {}))
        fitted = problem = None
        if arguments.fit_temperature:
            try:
                fitted = _fit(subject, outputs, answering, prior_C)
            except DataError as error:  # the evaluation is done all the same
                problem = str(error)
            else:
                write_temperature(subject.checkpoint, key, subject.split, fitted)
        if arguments.save:
            _save(subject, evaluation, shards, facts)
        return Found(subject.checkpoint, subject.classes, evaluation, facts, fitted, problem, reference)

    with torch.no_grad():
        return world.together(on_main)


def _answering(subject: Subject, prior: str) -> str:
    """The protocol that answers one image by itself under this class prior."""
    if subject.center is None:
        return "argmax"
    return {"training": "stored", "balanced": "balanced"}.get(prior, "given")


def _prior(subject: Subject, asked: str) -> torch.Tensor | None:
    if asked == "training":
        return None
    return anchor_for(asked, subject.card, subject.stored_anchor_C)[1]


def _forward(subject: Subject, shards: ShardSet, batch_size: int, world: World) -> Outputs | None:
    share = -(-shards.num_samples // world.size)
    with _progress(f"evaluating {subject.run_folder.name}", -(-share // batch_size), world) as on_batch:
        return network_outputs(
            subject.network,
            shards,
            subject.normalise,
            world,
            pipeline=subject.pipeline,
            batch_size=batch_size,
            on_batch=on_batch,
        )


@contextmanager
def _progress(title: str, batches: int, world: World) -> Iterator[Callable[[], None]]:
    with show_progress(title, batches, enabled=world.is_main, vanish=True) as advance:
        yield partial(advance, 1)


def _fit(subject: Subject, outputs: Outputs, protocol: str, prior_C: torch.Tensor | None) -> Calibration:
    scores_NC, labels_N = outputs.logits_NC[outputs.valid_N], outputs.labels_N[outputs.valid_N]
    if protocol != "argmax":
        anchor_C = prior_C if prior_C is not None else subject.stored_anchor_C
        assert anchor_C is not None
        scores_NC = invert(scores_NC, anchor_C.double())
    softmax = protocol == "argmax"
    return calibrate(temperable(scores_NC, softmax), probabilities_of(scores_NC, softmax=softmax), labels_N)


def _save(subject: Subject, evaluation: Evaluation, shards: ShardSet, facts: dict[str, Any]) -> None:
    state = subject.checkpoint.json("state.json")
    kept = {
        key: state[key] for key in ("checkpoint", "step", "epoch", "steps_per_epoch", "phase", "best") if key in state
    }
    facts = kept | {**facts, "checkpoint": subject.checkpoint.folder.name, "eval_digest": shards.digest}
    try:
        write_evaluation(subject.run_folder, evaluation, subject.classes, facts)
    except OSError as error:
        raise OatError(f"{subject.run_folder}: cannot be written to ({error.strerror})") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
