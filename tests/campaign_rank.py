"""What each rank of the campaign does: the real training command."""

from __future__ import annotations

import os
import sys

from oat_dist.train import main


def train(*arguments: str) -> None:
    code = main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
