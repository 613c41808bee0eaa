"""`doctor`: check an allocation before a training is trusted to it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence

from oat_dist.commands.arguments import positive
from oat_dist.config import load_config
from oat_dist.doctor import Options, Row, as_json, examine, print_rows
from oat_dist.errors import OatError, run_command

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Check an allocation before you trust a training to it. Start it exactly as you would start the training: with plain
python, accelerate launch, torchrun or srun, on the same nodes, with the same CONFIG and key=value overrides. Rank 0
prints a table; every warning and failure names what to do. Nothing is left in output_dir.

  processes      all that were started see each other; who is missing, and why
  versions       the same python, torch, ... and the same code of ours on every node
  devices        a GPU for each rank and nobody else on it; or cores enough for all threads
  all-reduce     how long 4 bytes and 32 MiB take
  output_dir     one folder for all nodes, which can be written to and locked, and in which nobody trains
  data, shards   the same on every node; every checksum verified once on each node (a set behind a URL: one shard)
  signals        job.stop_signals are neither ignored nor blocked, and heard by every rank
  slurm          in a job: whether it is requeued, time left, GPUs that nobody uses
  practice       3 real steps and one real save of this very configuration, and what they cost
  grace period   whether a stop fits between Slurm's signal and the end: job.check_seconds + 2 steps + 1 save, twice
  free space     for checkpoint.keep + 2 checkpoints; for data to be fetched
  delivery       in a job with job.stop_file: USR1 to the batch script makes the file appear

Exit status: 0 when nothing failed (warnings are allowed), 1 when something did, 2 when the configuration itself is
wrong.
"""

_EXAMPLES = """\
examples:
  oat-dist doctor configs/quickstart.yaml
  accelerate launch --config_file configs/accelerate/gpus.yaml launch/doctor.py CONFIG engine.precision=bf16
  torchrun --nproc_per_node 8 launch/doctor.py CONFIG --quick
  sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm/doctor.sbatch CONFIG

The last check sends USR1 to the batch script, unless it sees that the script has no trap and would die of it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key of the file")
    parser.add_argument("--quick", action="store_true", help="do not read the shards: presence and size are enough")
    parser.add_argument("--no-training", dest="training", action="store_false", help="do not practise")
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=float,
        help="from signal to end (default: $OAT_GRACE_SECONDS, --signal of the batch script, or 120)",
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=positive, default=120, help="for all processes to start (default 120)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    if arguments.grace is not None and not 0 < arguments.grace < math.inf:
        raise OatError("--grace must be a number of seconds above 0")
    config = load_config(arguments.config, arguments.overrides)
    options = Options(arguments.quick, arguments.training, arguments.grace, arguments.wait)

    def report(rows: list[Row], processes: int) -> None:
        seconds = time.monotonic() - started
        if arguments.json:
            facts = {"config": str(arguments.config), "overrides": list(arguments.overrides), "processes": processes}
            print(json.dumps(as_json(rows, **facts, seconds=round(seconds, 1)), indent=1), flush=True)
        else:
            print_rows(f"oat-dist doctor {arguments.config}, {processes} process(es)", rows, seconds)

    return examine(config, options, report)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="doctor")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
