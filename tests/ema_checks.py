"""What a process does for test_ema.py: runs with an average of the weights, and their plain counterparts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training_checks import fit

from oat_dist.commands.evaluate import _evaluate, add_arguments
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import OatError

STEPS = 12
DECAY = 0.5  # reached after 8 updates
# both phases, fast enough that the average lags behind
COMMON = (
    *("optim.lr=0.05", "epochs=2", "pretrain_epochs=1", "batch_size=239"),
    *(
        "data.drop_last=true",
        f"max_steps={STEPS}",
        "checkpoint.every_steps=1",
        "checkpoint.keep=99",
        "log.every_steps=1",
    ),
)
EMA = f"optim.ema={DECAY}"


def runs(root_text: str, data: str) -> dict[str, Any]:
    root = Path(root_text)
    engine = start_engine(threads=1)
    found: dict[str, Any] = {}
    fit(engine, root, data, "plain", *COMMON)
    averaged = fit(engine, root, data, "averaged", *COMMON, EMA)
    found["evaluated"] = labels(averaged.validation.evaluation)
    found["evaluated again"] = evaluate(engine, root / "averaged")
    found["evaluated raw"] = evaluate(engine, root / "plain")
    found["dropped"] = refused(engine, root, data, "averaged", *COMMON)
    found["added"] = refused(engine, root, data, "plain", *COMMON, EMA)
    for name, other, own in (("begun-averaged", "plain", [EMA]), ("begun-plain", "averaged", [])):
        origin = root / other / "checkpoints" / "step-7"
        fit(engine, root, data, name, *COMMON, *own, f"start_from={origin}", "max_steps=8")
    engine.close()
    return found


def refused(engine: Engine, root: Path, data: str, name: str, *overrides: str) -> str:
    try:
        fit(engine, root, data, name, *overrides)
    except OatError as error:
        return str(error)
    return ""


def labels(evaluation: Any) -> dict[str, list[int]]:
    return {name: result.predicted_N.tolist() for name, result in evaluation.protocols.items()}


def evaluate(engine: Engine, run: Path) -> dict[str, list[int]]:
    """What `oat-dist evaluate` finds, from the checkpoint alone."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = _evaluate(parser.parse_args([str(run)]), engine.world)
    assert found is not None
    return labels(found.evaluation)


def zero3(root_text: str, data: str) -> str:
    """The refusal of an engine whose ranks have no whole weights."""
    engine = start_engine(name="zero3", threads=1)
    said = refused(engine, Path(root_text), data, "zero3", EMA)
    engine.close()
    return said
