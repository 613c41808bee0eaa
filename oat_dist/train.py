"""``accelerate launch -m oat_dist.train CONFIG [key=value ...]``: what launch/train.py and oat-dist train call."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from oat_dist.config import Config, describe_keys, load_config
from oat_dist.errors import OatError, run_command
from oat_dist.outcome import end_outcome, write_outcome
from oat_dist.parts import engine_for
from oat_dist.pulse import Pulse
from oat_dist.run_summary import describe_layout, finish_run
from oat_dist.stopping import StopRequests, signal_numbers
from oat_dist.trainer import Trainer
from oat_dist.watchdog import Watchdog

__all__ = ["main"]

_DESCRIPTION = """\
Train an image classifier with cross-entropy first and Online Anchor-based Training (OAT) after.

examples:
  one process:      python launch/train.py configs/cifar10/lightweight.yaml
  two CPU ranks:    accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/train.py CONFIG
  every GPU here:   accelerate launch --config_file configs/accelerate/gpus.yaml launch/train.py CONFIG

A run continues from the newest valid checkpoint of its output_dir; start it again with the same command. Ctrl-C (or
SIGTERM, SIGUSR1, the file job.stop_file) stops all ranks after the same step and saves; Ctrl-C again stops at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = "keys of the config file, with their defaults:\n" + describe_keys()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="override a key of the file, e.g. optim.lr=0.01"
    )


def run(arguments: argparse.Namespace) -> int:
    path = _outcome_file(arguments.overrides) if os.environ.get("RANK", "0") == "0" else None
    try:
        return _train(load_config(arguments.config, arguments.overrides))
    except BaseException as error:
        end_outcome(path, "refused" if isinstance(error, OatError) and error.permanent else "failed")
        raise


def _outcome_file(overrides: Sequence[str]) -> str | None:
    """``job.outcome_file`` of a command line, also where the configuration as a whole cannot be read."""
    return next((text[17:] for text in reversed(overrides) if text.startswith("job.outcome_file=")), None)


def _train(config: Config) -> int:
    job, main = config.job, os.environ.get("RANK", "0") == "0"
    stop_file = None if job.stop_file is None else Path(job.stop_file)
    requests = StopRequests(signal_numbers(job.stop_signals), stop_file, speaks=main)
    with requests.listening():
        engine = engine_for(config)
        watchdog = Watchdog(60 * config.engine.timeout_minutes, engine.world.rank)
        with engine.peers(), watchdog.watching():
            trainer = Trainer(config, engine, Pulse(engine.world, requests, watchdog, job.check_seconds))
            requests.say = trainer.display.say
            if not config.dry_run:
                trainer.fit()
                state = "finished" if trainer.finished else "stopped"
                write_outcome(job.outcome_file, engine.world, state, trainer.saved_step, trainer.total_steps)
        if engine.world.is_main:
            if config.dry_run:
                print(describe_layout(trainer))
            else:
                finish_run(trainer)
        engine.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
