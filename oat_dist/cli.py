"""``oat-dist``: every command behind one name; the scripts in launch/ and shards/ call the same code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from oat_dist.errors import run_command

__all__ = ["main"]

# Command -> module; imported on use, so that --help answers at once.
_COMMANDS = {
    "pack": ("oat_dist.commands.pack", "pack images into shards"),
    "index": ("oat_dist.commands.index", "index shards that somebody else wrote"),
    "verify": ("oat_dist.commands.verify", "check packed or indexed shards, find copies and leakage"),
    "inspect": ("oat_dist.commands.inspect", "what a set holds, in numbers and pictures"),
    "train": ("oat_dist.train", "train (start it with accelerate launch for several processes)"),
    "evaluate": ("oat_dist.commands.evaluate", "accuracy of a checkpoint under every protocol"),
    "predict": ("oat_dist.commands.predict", "classify images"),
    "export": ("oat_dist.commands.export", "write a model as ONNX, torch.export or portable files, checked"),
    "verify-parallel": ("oat_dist.commands.verify_parallel", "check that N ranks train exactly as one process does"),
    "doctor": ("oat_dist.commands.doctor", "check an allocation before you trust it (start it as the training)"),
    "report": ("oat_dist.commands.report", "write the report of a run"),
    "reproduce": ("oat_dist.commands.reproduce", "run a table of experiments, over seeds, with intervals"),
}

_EXAMPLES = """\
examples:
  oat-dist pack digits - packed/digits
  oat-dist inspect packed/digits
  oat-dist train configs/quickstart.yaml
  oat-dist evaluate runs/quickstart
  oat-dist export runs/quickstart exported/digits
  oat-dist verify-parallel configs/quickstart.yaml

oat-dist COMMAND --help explains a command.
"""


def _run(name: str, arguments: list[str]) -> int:
    module = importlib.import_module(_COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"oat-dist {name}")
    module.add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments)  # options may stand between CONFIG and key=value
    return int(module.run(parsed))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _COMMANDS:
        return run_command(
            lambda: _run(arguments[0], arguments[1:])
        )  # imports take seconds: Ctrl-C is heard in them too
    parser = argparse.ArgumentParser(
        prog="oat-dist",
        description="Exact distributed Online Anchor-based Training of image classifiers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, text) in _COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main())
