"""Imports the trainer once and forks a real training process for every line on stdin: ``name [override ...]``.

Answers ``started PID``, then ``ended STATUS`` once that process is gone, however it went.
"""

from __future__ import annotations

import os
import sys

import torch

import oat_dist.report  # noqa: F401  # a run needs it at its end
from oat_dist.train import main


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments = line.split()
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os._exit(main(arguments))
        print(f"started {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
