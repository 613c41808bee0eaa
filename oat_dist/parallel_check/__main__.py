"""One process of a check: ``python -m oat_dist.parallel_check FOLDER reference|ENGINE``.

Started by `processes`, which holds our standard input open for as long as it lives.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from oat_dist.config import load_config
from oat_dist.engine import start_engine
from oat_dist.errors import run_command
from oat_dist.parallel_check.job import read_job
from oat_dist.parallel_check.ranks import run_rank
from oat_dist.parallel_check.reference import run_reference


def _end_with_parent() -> None:
    """However the parent ends, also by SIGKILL, the pipe closes."""
    os.read(0, 1)  # without sys.stdin's lock, which the interpreter wants at its own end
    os._exit(1)


def _run(folder: Path, name: str) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job, config = read_job(folder), load_config(folder / "config.yaml")
    stage = json.loads((folder / f"stage-{name}.json").read_text())
    # GPUs round the inputs of fp32 products to 10 bits unless told not to.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    engine = start_engine(
        name=stage["engine"],
        deepspeed=stage["deepspeed"],
        precision="no",
        processes=stage["processes"],
        threads=config.engine.threads,
        timeout_minutes=config.engine.timeout_minutes,
        deterministic=config.deterministic,
    )
    remedy = "the check needs the joined batch in one process: give it a smaller batch_size=... on the command line"
    with engine.peers(), engine.memory(remedy):
        if name == "reference":
            run_reference(engine, job, config, folder)
        else:
            run_rank(engine, job, config, folder, name, stage["controls"])
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: _run(Path(sys.argv[1]), sys.argv[2])))
