"""What ranks do for test_launch.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ranks import HERE
from training_checks import fit

from oat_dist.engine import start_engine
from oat_dist.errors import LaunchError


def refusals() -> dict[str, str | None]:
    """What start_engine says in each environment; None when it starts."""

    def attempt(environment: dict[str, str], **arguments: Any) -> str | None:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            start_engine(**arguments)
        except LaunchError as error:
            return str(error)
        finally:
            os.environ.clear()
            os.environ.update(before)
        return None

    return {
        "none": attempt({}),
        "srun": attempt({"SLURM_STEP_NUM_TASKS": "2"}),
        "processes": attempt({}, processes=2),
        "deepspeed": attempt({"ACCELERATE_USE_DEEPSPEED": "true"}, name="ddp"),
        "deepspeed file": attempt(
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(HERE.parent / "configs/deepspeed/zero2.json"),
            },
            name="zero3",
        ),
        "fsdp": attempt({"ACCELERATE_USE_FSDP": "true"}),
        "fp16": attempt({"ACCELERATE_MIXED_PRECISION": "fp16"}),
        "precision": attempt({"ACCELERATE_MIXED_PRECISION": "bf16"}, precision="no"),
    }


def skip(root: str, data: str) -> list[Any]:
    """Train over the bad image: (how many this rank skipped, whether everything stayed finite)."""
    engine = start_engine(threads=1)
    trainer = fit(engine, Path(root), data, "skipped", "data.on_bad=skip", "epochs=1", "pretrain_epochs=0")
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in trainer.network.parameters())
    mine = sorted(trainer.data.builder.bad)
    assert mine in ([], [700])
    assert sorted(trainer.bad) == [700]  # every rank knows of it at the end
    engine.close()
    return [len(mine), finite]
