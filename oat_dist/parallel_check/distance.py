"""How far trained weights lie from a reference, measured by how far that has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from oat_dist.errors import TrainingError

__all__ = ["distance", "start_file", "weights_file"]


def start_file(folder: Path) -> Path:
    return folder / "start.safetensors"


def weights_file(folder: Path, reference: int) -> Path:
    return folder / f"reference-{reference}.safetensors"


def distance(weights: Mapping[str, Tensor], folder: Path, reference: int) -> float:
    """``|theta - theta_1| / |theta_1 - theta_0|`` over all parameters, in float64, one tensor at a time.

    Raises:
        TrainingError: the reference has not moved.
    """
    off = moved = 0.0
    with safe_open(weights_file(folder, reference), "pt") as trained, safe_open(start_file(folder), "pt") as start:
        names: list[str] = trained.keys()
        for name in names:
            one = trained.get_tensor(name).double()
            off += float((weights[name].detach().cpu().double() - one).square().sum())
            moved += float((one - start.get_tensor(name).double()).square().sum())
    if moved == 0:
        raise TrainingError(
            "no parameter of the one-process reference has moved, so there is nothing to compare; raise optim.lr, or "
            "check model.freeze"
        )
    return math.sqrt(off / moved)
