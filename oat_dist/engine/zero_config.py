"""The DeepSpeed settings of a run: the user's own JSON, completed from our config and from nowhere else.

Batch sizes, accumulation, clipping, precision and the optimizer have one source, our config, so that the two can never
disagree. Everything else of DeepSpeed (offload, bucket sizes, prefetching) is the JSON's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oat_dist.errors import ConfigError, LaunchError

__all__ = ["BatchShape", "complete", "read_settings", "stage_of"]

# Keys that follow from our config, with the name they have there.
_OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.name; the optimizer is never exchanged for another",
    "fp16": "engine.precision; use bf16, which needs no loss scaling",
    "bf16": "engine.precision (bf16 means torch_autocast over fp32 weights)",
    "managed_gradient_accumulation": "batch_size and micro_batch_size",
}


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch of a rank, and the micro-batches of a full window."""

    micro_batch_size: int
    accumulation: int


def read_settings(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON without the keys that are ours ("auto" and a switched-off precision are taken for silence).

    Raises:
        ConfigError: not a JSON object, no ZeRO stage, or a key that follows from our config.
    """
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed file (paths are relative to where you start)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a DeepSpeed JSON file ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path}: a DeepSpeed file is a JSON object; see configs/deepspeed/")
    for key, ours in _OURS.items():
        value = settings.pop(key, "auto")
        silent = value == "auto" or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))
        if not silent and value != _REQUIRED.get(key):
            raise ConfigError(f'{path}: {key} follows from {ours}; take it out of the file, or write "auto"')
    if not isinstance(settings.get("torch_autocast", {}), dict):
        raise ConfigError(f"{path}: torch_autocast is an object; see configs/deepspeed/")
    for key in ("enabled", "dtype"):
        if key in settings.get("torch_autocast", {}):
            raise ConfigError(f"{path}: torch_autocast.{key} follows from engine.precision; take it out of the file")
    _refuse_unfit(settings, path)
    stage_of(settings, str(path))
    return settings


def _refuse_unfit(settings: Mapping[str, Any], path: Path) -> None:
    """What would round gradients or weights in silence, or keep state where a checkpoint cannot be made of it.

    Raises:
        ConfigError: naming the key.
    """
    if settings.get("communication_data_type") not in (None, "auto", "fp32"):
        raise ConfigError(
            f"{path}: communication_data_type={settings['communication_data_type']} would round every gradient; take "
            "it out (torch_autocast.lower_precision_safe_modules does so by layer, under engine.precision=bf16)"
        )
    zero = settings.get("zero_optimization", {})
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            raise ConfigError(f"{path}: {key} trains another network than one process does; take it out")
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        device = offload.get("device", "none") if isinstance(offload, dict) else offload
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{path}: {key}.device must be cpu or none, not {device}: no checkpoint can be made of it"
            )


_REQUIRED: Mapping[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def stage_of(settings: Mapping[str, Any], where: str) -> int:
    """The ZeRO stage of DeepSpeed settings.

    Raises:
        ConfigError: none, or one that is not 1, 2 or 3.
    """
    stage = settings.get("zero_optimization", {}).get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ConfigError(
            f"{where}: zero_optimization.stage must be 1, 2 or 3, not {json.dumps(stage)}; "
            "for plain data parallel use engine.name=ddp and no DeepSpeed"
        )
    return int(stage)


def complete(
    settings: Mapping[str, Any], world_size: int, batch: BatchShape, clip_norm: float | None, precision: str
) -> dict[str, Any]:
    """The whole DeepSpeed configuration.

    DeepSpeed wants one micro-batch size: it gets the largest. The true sizes, also of uneven and short windows, are in
    the loss, which is exact; DeepSpeed only ever averages over ranks.
    """
    full = copy.deepcopy(dict(settings))
    autocast = full.pop("torch_autocast", {})
    # DeepSpeed's own 5e8 is a buffer of 2 GB (4 GB with overlap_comm): more than all of ViT-L-16 under DDP.
    full["zero_optimization"] = {"reduce_bucket_size": 10_000_000, **full["zero_optimization"]}
    full |= {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.micro_batch_size * batch.accumulation * world_size,
        "gradient_clipping": clip_norm or 0.0,
        **_REQUIRED,
        # fp32 weights under autocast, as with DDP. Gradients travel in fp32 unless the file names modules.
        "torch_autocast": {
            "lower_precision_safe_modules": [],
            **autocast,
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
        },
    }
    return full


def with_offload(stage: int, optimizer: str, parameters: str) -> dict[str, Any]:
    """Settings from what accelerate's own yaml says when it names no DeepSpeed file.

    Raises:
        LaunchError: a device other than cpu.
    """
    zero: dict[str, Any] = {"stage": stage}
    for key, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if device == "none":
            continue
        if device != "cpu":
            raise LaunchError(f"the launcher's {key}_device={device}: only cpu is supported")
        zero[key] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}
