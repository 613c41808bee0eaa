"""``accelerate launch -m oat_dist.train CONFIG [key=value ...]``: what launch/train.py and oat-dist train call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from oat_dist.config import describe_keys, load_config
from oat_dist.engine import start_engine
from oat_dist.errors import run_command
from oat_dist.run_summary import describe_layout, finish_run
from oat_dist.trainer import Trainer

__all__ = ["main"]

_DESCRIPTION = """\
Train an image classifier with cross-entropy first and Online Anchor-based Training (OAT) after.

examples:
  one process:      python launch/train.py configs/cifar10/lightweight.yaml
  two CPU ranks:    accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/train.py CONFIG
  every GPU here:   accelerate launch --config_file configs/accelerate/gpus.yaml launch/train.py CONFIG

A run continues from the newest valid checkpoint of its output_dir; start it again with the same command.
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
    config = load_config(arguments.config, arguments.overrides)
    engine = start_engine(
        name=config.engine.name,
        deepspeed=config.engine.deepspeed,
        precision=config.engine.precision,
        processes=config.engine.processes,
        threads=config.engine.threads,
        timeout_minutes=config.engine.timeout_minutes,
        deterministic=config.deterministic,
    )
    with engine.peers():
        trainer = Trainer(config, engine)
        if not config.dry_run:
            trainer.fit()
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
