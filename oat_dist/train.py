"""``accelerate launch -m oat_dist.train CONFIG [key=value ...]``: what launch/train.py and oat-dist train call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from oat_dist.config import Config, describe_keys, load_config
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import LaunchError, run_command
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
        precision=config.engine.precision,
        processes=config.engine.processes,
        threads=config.engine.threads,
        timeout_minutes=config.engine.timeout_minutes,
        deterministic=config.deterministic,
    )
    _train(config, engine)
    engine.close()
    return 0


def _train(config: Config, engine: Engine) -> None:
    try:
        trainer = Trainer(config, engine)
        if config.dry_run:
            if engine.world.is_main:
                print(describe_layout(trainer))
            return
        trainer.fit()
        if engine.world.is_main:
            finish_run(trainer)
    except RuntimeError as error:
        # The peer that stopped first has said why; this is only how the others notice.
        gone = isinstance(error, torch.distributed.DistBackendError) or any(s in str(error) for s in _PEER_IS_GONE)
        if engine.world.size > 1 and gone:
            raise LaunchError(
                f"rank {engine.world.rank} stops because another rank has stopped; the reason is in that rank's output "
                f"({str(error).splitlines()[0]})"
            ) from error
        raise


_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
