"""What launcher and config ask for together: engine, DeepSpeed settings, precision. A conflict names both."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oat_dist.engine.zero_config import read_settings, stage_of, with_offload
from oat_dist.errors import ConfigError, LaunchError

__all__ = ["ENGINES", "PRECISIONS", "Plan", "agree", "is_true"]

ENGINES = ("ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("no", "bf16")
_OTHER_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


@dataclass(frozen=True)
class Plan:
    """What is to be started. `settings` is what DeepSpeed gets, without what follows from the batch."""

    engine: str
    precision: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 for plain data parallel."""
        return 0 if self.engine == "ddp" else int(self.engine.removeprefix("zero"))


def is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def agree(engine: str | None, deepspeed: str | None, precision: str | None) -> Plan:
    """Config and launcher as one.

    Args:
        engine: engine.name, one of `ENGINES`; None: what the launcher says, else ddp.
        deepspeed: engine.deepspeed, a DeepSpeed JSON file; None: the launcher's, else DeepSpeed's defaults.
        precision: engine.precision; None: what the launcher says, else no.

    Raises:
        LaunchError: config and launcher disagree, or the launcher asks for what there is not.
        ConfigError: an unusable DeepSpeed file.
    """
    for variable, other in _OTHER_ENGINES.items():
        if is_true(variable):
            raise LaunchError(
                f"the launcher asks for {other} ({variable}); the engines are {', '.join(ENGINES)}: "
                "launch with one of configs/accelerate/"
            )
    chosen = _precision(precision)
    settings, source = _settings(deepspeed)
    if settings is None:
        name = engine or "ddp"
        if name == "ddp":
            return Plan("ddp", chosen)
        settings = {"zero_optimization": {"stage": int(name.removeprefix("zero"))}}
    else:
        name = f"zero{stage_of(settings, source)}"
        if engine is not None and engine != name:
            raise LaunchError(f"engine.name={engine} is asked for, but {source} says {name}; make them agree")
    return Plan(name, chosen, settings)


def _settings(deepspeed: str | None) -> tuple[dict[str, Any] | None, str]:
    """DeepSpeed settings of config or launcher and where they come from; None where neither asks for DeepSpeed."""
    named = None if deepspeed is None else Path(deepspeed)
    if not is_true("ACCELERATE_USE_DEEPSPEED"):
        return (None, "") if named is None else (read_settings(named), f"engine.deepspeed={named}")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    launched = None if file in ("", "none") else Path(file)
    if named is not None and launched is not None and named.resolve() != launched.resolve():
        raise LaunchError(
            f"the config says engine.deepspeed={named}, the launcher deepspeed_config_file: {launched}; make them agree"
        )
    path = named or launched
    if path is not None:
        return read_settings(path), f"{'engine.deepspeed' if named else 'the launcher'} ({path})"
    for variable, key, silent in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "batch_size and micro_batch_size", ("auto", "1")),
        ("ACCELERATE_GRADIENT_CLIPPING", "optim.clip_norm", ("auto", "none")),
    ):
        value = os.environ.get(variable, "auto")
        if value not in silent:
            raise LaunchError(f"the launcher sets {variable}={value}, which follows from {key}; take it out there")
    settings = with_offload(
        _launched_stage(),
        os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
    )
    return settings, "the launcher (zero_stage)"


def _launched_stage() -> int:
    text = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    try:
        return stage_of({"zero_optimization": {"stage": int(text)}}, "the launcher")
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise LaunchError(f"the launcher's zero_stage is {text!r}; use 1, 2 or 3") from None


def _precision(asked: str | None) -> str:
    """The precision of config and launcher. The launcher's "no" is its default and so says nothing."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher not in PRECISIONS:
        raise LaunchError(f"the launcher asks for mixed precision {launcher!r}; use bf16, which needs no loss scaling")
    if asked is not None and launcher != "no" and asked != launcher:
        raise LaunchError(
            f"the config says engine.precision={asked}, the launcher --mixed_precision {launcher}; make them agree"
        )
    return asked or launcher
