"""What a run says about itself: where it ran, what it trained on, what its network is."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from oat_dist.anchor import default_floor
from oat_dist.config import Config
from oat_dist.data.remote.fetch import shown_text
from oat_dist.data_parts import DataParts
from oat_dist.distributed import World
from oat_dist.engine import Engine

__all__ = ["environment", "how_trained", "model_card", "run_facts", "run_identity"]


def environment(world: World, **facts: Any) -> dict[str, Any]:
    """What environment.json says: command, versions, device, and the given facts."""
    packages = {}
    for name in ("oat_dist", "torch", "torchvision", "accelerate", "deepspeed", "webdataset", "safetensors", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": shlex.join(map(shown_text, sys.orig_argv)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "world_size": world.size,
        **facts,
    }


def run_facts(engine: Engine, data: DataParts, num_parameters: int) -> dict[str, Any]:
    return {
        **run_identity(data, engine),
        "engine": engine.name,
        "threads": engine.threads,
        "classes": data.train_set.classes,
        "train_samples": data.train_set.num_samples,
        "eval_samples": data.eval_set.num_samples if data.eval_set else 0,
        "parameters": num_parameters,
    }


def how_trained(engine: Engine, start_from: str | None) -> dict[str, Any]:
    """What metrics.jsonl says where a run begins or goes on; `start_from` is what it began as a copy of."""
    how = {"engine": engine.name, "precision": engine.precision, "threads": engine.threads}
    return how | {"world_size": engine.world.size} | ({"start_from": start_from} if start_from else {})


def run_identity(data: DataParts, engine: Engine) -> dict[str, Any]:
    """What must be the same when a run goes on, besides its configuration."""
    return {
        "train_digest": data.train_set.digest,
        "eval_digest": data.eval_set.digest if data.eval_set else None,
        "precision": engine.precision,
    }


def model_card(config: Config, classes: list[str], objective: str) -> dict[str, Any]:
    """All that is needed to use the network without the run's configuration (model.json of a checkpoint)."""
    return {
        "name": config.model.name,
        "classes": classes,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "crop": config.data.eval_crop,
        "crop_fraction": config.data.crop_fraction,
        "objective": objective,
        "center": config.anchor.center,
        "floor": default_floor(config.anchor.center, len(classes), config.anchor.floor),
        **({} if config.optim.ema is None else {"ema": config.optim.ema}),
    }
