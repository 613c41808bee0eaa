"""What each rank does for test_portable.py: one run handed from engine to engine, and each engine's own resume."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from training_checks import fit, fit_in_two

from oat_dist.engine import start_engine

STEPS = 10
# Both phases, so that the optimizer starts anew in the middle; uneven shares; accumulation; every option of a step.
COMMON = (
    *("epochs=1", f"max_steps={STEPS}", "pretrain_epochs=0", "anchor.scope=global", "anchor.span=step"),
    *("batch_size=45", "micro_batch_size=12", "optim.clip_norm=1.0", "optim.head_lr_scale=3.0"),
    *("data.augment=flip", "log.every_steps=1", "data.eval_split=null"),
)
OPTIMIZERS = {
    "sgd": ("optim.name=sgd", "optim.weight_decay=0.01"),
    "adamw": ("optim.name=adamw", "optim.lr=0.001"),
}


# Engines whose own resume is compared bit by bit; DDP's is in test_training.py, with both optimizers.
BITWISE = (("zero1", "sgd"), ("zero2", "adamw"), ("zero3", "sgd"), ("zero3", "adamw"))


def part(root: str, data: str, name: str, settings: str | None, stop: int, alone: bool) -> dict[str, Any]:
    """Take the runs ``chain-<optimizer>`` on to `stop` steps; then this engine's own undisturbed and resumed runs."""
    engine = start_engine(name=name, deepspeed=settings, threads=1)
    found: dict[str, Any] = {"world": engine.world.size}
    folder = Path(root)
    for optimizer, extra in OPTIMIZERS.items():
        whose = "whole" if alone else "chain"
        trainer = fit(engine, folder, data, f"{whose}-{optimizer}", *COMMON, *extra, f"max_steps={stop}")
        trainer.replica.close()
        # with the last part of the global batch of 45 dealt unevenly, and BatchNorm statistics and dropout in the state
        own = () if (name, optimizer) not in BITWISE else (f"{name}-whole-{optimizer}", f"{name}-resumed-{optimizer}")
        for run in own:
            arguments = (engine, folder, data, run)
            overrides = (*COMMON, *extra, "model.name=mobilenet_v3_small", "max_steps=3")
            overrides = (*overrides, "micro_batch_size=null", "anchor.span=micro")
            if name != "zero3":
                overrides = (*overrides, "optim.ema=0.99")
            if "resumed" in run:
                fit_in_two(*arguments, 1, *overrides)
            else:
                fit(*arguments, *overrides)
    engine.close()
    return found


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.glob("*.safetensors"))
    }
