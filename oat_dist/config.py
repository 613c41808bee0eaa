"""The whole configuration of a run: frozen dataclasses, strict YAML, ``key=value`` overrides.

Every key is one field below; its `help` text is what ``--help`` prints. An unknown key is refused with the nearest
name, an impossible value with the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oat_dist.anchor import CENTERS, default_floor
from oat_dist.data.loader import ON_BAD
from oat_dist.data.transforms import AUGMENTATIONS
from oat_dist.engine.launcher import ENGINES, PRECISIONS
from oat_dist.errors import ConfigError
from oat_dist.evaluate import PROTOCOLS
from oat_dist.oat_loss import SCOPES
from oat_dist.optim import OPTIMIZERS, SCHEDULES
from oat_dist.window_step import SPANS

__all__ = ["Config", "describe_keys", "load_config", "to_yaml"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _key(default: Any, text: str) -> Any:
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    name: str = _key("lightweight", "lightweight, wrn_28_10 (32x32 input), or any classifier of torchvision or timm")
    weights: str | None = _key(None, "to start from: a safetensors or state-dict file, or pretrained (download)")
    freeze: str | None = _key(None, "parameters not to train: names with wildcards, by spaces; body: all but the head")
    gradient_checkpointing: bool = _key(False, "recompute activations in backward: less memory, more time (ViT, timm)")
    channels_last: bool = _key(False, "memory format of convolutions; faster on GPUs with bf16")
    compile: bool = _key(False, "torch.compile the network (not with zero3)")
    sync_batchnorm: bool = _key(True, "BatchNorm over all ranks' micro-batch; on GPUs only")


@dataclass(frozen=True)
class DataConfig:
    path: str = _key("", "packed data set: the OUTPUT folder given to shards/pack.py (required)")
    train_split: str = _key("train", "split to train on")
    eval_split: str | None = _key("test", "split to evaluate on; null: none")
    image_size: int = _key(32, "images are squashed to this many pixels a side")
    mean: list[float] = _key(IMAGENET_MEAN, "subtracted, per channel of 0..1")
    std: list[float] = _key(IMAGENET_STD, "divided by, per channel")
    augment: str = _key("none", f"one of {', '.join(AUGMENTATIONS)} (the paper: none)")
    drop_last: bool = _key(False, "drop the last, partial batch of an epoch (the paper keeps it)")
    on_bad: str = _key("stop", "an undecodable image: stop, or skip (it keeps its slot, masked)")
    max_bad: int = _key(100, "with on_bad=skip: stop after this many different bad images on a rank")
    workers: int = _key(2, "decoding threads of each process")
    prefetch: int = _key(8, "micro-batches decoded ahead of need")


@dataclass(frozen=True)
class OptimConfig:
    name: str = _key("sgd", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = _key(0.001, "learning rate after warm-up")
    momentum: float = _key(0.9, "of sgd; starts anew at the switch to OAT")
    weight_decay: float = _key(0.0, "not applied to norms and biases")
    beta1: float = _key(0.9, "of adamw")
    beta2: float = _key(0.999, "of adamw")
    schedule: str = _key("constant", f"one of {', '.join(SCHEDULES)}; a function of the global step")
    warmup_epochs: float = _key(0.0, "linear warm-up from 0")
    step_epochs: float = _key(30.0, "schedule step: multiply by step_gamma every so many epochs")
    step_gamma: float = _key(0.1, "factor of schedule step")
    final_lr: float = _key(0.0, "schedule cosine ends here")
    clip_norm: float | None = _key(None, "clip the global gradient norm to this")
    head_lr_scale: float = _key(1.0, "the last layer learns at this many times the learning rate")


@dataclass(frozen=True)
class AnchorConfig:
    center: str = _key("probabilities", f"what is averaged: one of {', '.join(CENTERS)}")
    scope: str = _key("device", f"whose batch the anchor is of: one of {', '.join(SCOPES)}")
    span: str = _key("micro", "micro: an anchor within a micro-batch; step: over the accumulation window (two passes)")
    group_size: int = _key(32, "samples an anchor set has with scope group")
    grad: bool | None = _key(None, "gradient through the anchor; null: yes, but no for center prior")
    floor: float | None = _key(None, "eps of the anchor floor; null: 0, but 0.2/C for center prior")


@dataclass(frozen=True)
class EngineConfig:
    name: str | None = _key(None, f"one of {', '.join(ENGINES)}; null: what accelerate launch says, else ddp")
    deepspeed: str | None = _key(None, "DeepSpeed JSON file with further settings (configs/deepspeed/)")
    precision: str | None = _key(None, "no (fp32) or bf16; null: what accelerate launch says, else no")
    processes: int | None = _key(None, "refuse to start with another number of processes; null: any")
    threads: int | None = _key(None, "CPU threads of each process; null: its share of the machine's cores")
    timeout_minutes: float = _key(30.0, "a collective that waits longer than this is an error")


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = _key(1, "save after every so many epochs; 0: only at the end")
    every_steps: int = _key(0, "save every so many steps; 0: never")
    every_minutes: float = _key(0.0, "save when so much time has passed since the last one; 0: never")
    keep: int = _key(2, "newest checkpoints to keep; the best one is kept besides")


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = _key(1, "evaluate after every so many epochs; 0: only at the end")
    batch_size: int = _key(256, "forward batch of each process; changes speed only, never the answer")
    group_size: int = _key(32, "protocol batch: samples that share an anchor")
    seed: int = _key(0, "protocol batch: seed of the permutation that forms the groups")
    protocol: str = _key("batch", f"chooses the best checkpoint of the OAT phase: one of {', '.join(PROTOCOLS)}")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = _key(50, "steps between lines of metrics.jsonl")


@dataclass(frozen=True)
class Config:
    output_dir: str = _key("", "run folder (required); training resumes from its newest valid checkpoint")
    batch_size: int = _key(32, "global batch: samples of one optimizer step over all processes")
    micro_batch_size: int | None = _key(None, "most samples a process holds at once; null: its whole share")
    epochs: int = _key(100, "total epochs, pre-training included")
    pretrain_epochs: int = _key(10, "first epochs, with cross-entropy; equal to epochs: no OAT at all")
    max_steps: int | None = _key(None, "stop after this many steps; null: after all epochs")
    seed: int = _key(0, "of initialisation, order and augmentation")
    deterministic: bool = _key(False, "deterministic kernels on GPUs (slower); CPU runs always are")
    resume: bool = _key(True, "false: refuse a run folder that holds a run instead of resuming it")
    dry_run: bool = _key(False, "print model, batch layout and steps, and stop")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


class _Loader(yaml.SafeLoader):
    """YAML without surprises: scalars stay text until their key's type reads them, so that ``no``, ``1e-3`` or a date
    mean what they say; only null (and ``<<``) is special. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys), check every value.

    Raises:
        ConfigError: file missing or not YAML, unknown key (the nearest one is named), wrong type, impossible value.
    """
    path = Path(path)
    try:
        values = _parse(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    merged = _merge(OmegaConf.structured(Config), values, str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: an override has the form key=value, such as batch_size=64")
        try:
            value = _parse(text)
        except yaml.YAMLError:
            value = text
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested, f"override {override!r}")
    config = typing.cast(Config, OmegaConf.to_object(merged))
    _check(config)
    return config


def _merge(base: Any, values: dict[Any, Any], where: str) -> Any:
    _check_keys(values, Config, "", where)
    try:
        return OmegaConf.merge(base, OmegaConf.create(_literal(values)))
    except OmegaConfBaseException as error:
        text = re.sub(" of type '[a-zA-Z]+'", "", str(error).split("\n")[0].strip()).replace("'None'", "null")
        raise ConfigError(f"{where}: {getattr(error, 'full_key', None) or 'value'}: {text}") from error


def _literal(value: Any) -> Any:
    """Escape what OmegaConf would replace: a value is what it says."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


def _check_keys(values: dict[Any, Any], section: type, prefix: str, where: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in fields:
            everything = [name for name, _, _ in _walk(Config)]
            full = f"{prefix}{key}"
            close = difflib.get_close_matches(full, everything, n=1, cutoff=0.5) or [
                name for name in everything if name.split(".")[-1] == str(key)
            ]
            hint = f"did you mean {close[0]}?" if close else "see --help for every key"
            raise ConfigError(f"{where}: unknown key {full!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {prefix}{key} is a section with keys of its own, not a single value")
            _check_keys(value, typing.cast(type, hints[key]), f"{prefix}{key}.", where)
        elif typing.get_origin(hints[key]) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{where}: {prefix}{key} is a list, such as [0.5, 0.5, 0.5]")
        elif isinstance(value, (dict, list)):
            raise ConfigError(f"{where}: {prefix}{key} is a single value, not a list or a section")
        elif value == "???":  # OmegaConf's mark of a missing value
            raise ConfigError(f"{where}: {prefix}{key}=??? is a place-holder; give a value")


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, help) of every key."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _walk(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        else:
            default = (
                item.default if item.default is not dataclasses.MISSING else typing.cast(Any, item).default_factory()
            )
            yield f"{prefix}{item.name}", default, item.metadata["help"]


def describe_keys() -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines = []
    for name, default, text in _walk(Config):
        shown = {"None": "null", "True": "true", "False": "false", "": "''"}.get(str(default), str(default))
        lines.append(f"  {name + '=' + shown:<34} {text}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved configuration; loading it again gives an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _check(config: Config) -> None:
    """Refuse what cannot work, naming the remedy."""
    data, optim, anchor, engine = config.data, config.optim, config.anchor, config.engine
    _choice("data.augment", data.augment, AUGMENTATIONS)
    _choice("data.on_bad", data.on_bad, ON_BAD)
    _choice("optim.name", optim.name, OPTIMIZERS)
    _choice("optim.schedule", optim.schedule, SCHEDULES)
    _choice("anchor.center", anchor.center, CENTERS)
    _choice("anchor.scope", anchor.scope, SCOPES)
    _choice("eval.protocol", config.eval.protocol, PROTOCOLS)
    for name, text in (("output_dir", config.output_dir), ("data.path", data.path)):
        if not text:
            raise ConfigError(f"{name} is required; set it in the config file or give {name}=... on the command line")
    for name, value, least in (
        ("batch_size", config.batch_size, 1),
        ("micro_batch_size", config.micro_batch_size, 1),
        ("epochs", config.epochs, 1),
        ("pretrain_epochs", config.pretrain_epochs, 0),
        ("max_steps", config.max_steps, 1),
        ("data.image_size", data.image_size, 1),
        ("data.workers", data.workers, 1),
        ("data.prefetch", data.prefetch, 0),
        ("data.max_bad", data.max_bad, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.warmup_epochs", optim.warmup_epochs, 0),
        ("optim.final_lr", optim.final_lr, 0),
        ("anchor.group_size", anchor.group_size, 1),
        ("engine.processes", engine.processes, 1),
        ("engine.threads", engine.threads, 1),
        ("checkpoint.every_epochs", config.checkpoint.every_epochs, 0),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 0),
        ("checkpoint.every_minutes", config.checkpoint.every_minutes, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("eval.every_epochs", config.eval.every_epochs, 0),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("eval.group_size", config.eval.group_size, 1),
        ("seed", config.seed, 0),
        ("eval.seed", config.eval.seed, 0),
        ("log.every_steps", config.log.every_steps, 1),
    ):
        # Everything whole must fit a 64-bit word.
        if value is not None and not least <= value < 2**63:
            limit = f"at least {least}" if value < least else "below 2^63"
            raise ConfigError(f"{name} must be {limit}, not {value}")
    for name, number in (
        ("optim.lr", optim.lr),
        ("optim.step_epochs", optim.step_epochs),
        ("optim.step_gamma", optim.step_gamma),
        ("optim.head_lr_scale", optim.head_lr_scale),
        ("engine.timeout_minutes", engine.timeout_minutes),
    ):
        if not 0 < number < float("inf"):
            raise ConfigError(f"{name} must be a positive number, not {number}")
    if optim.clip_norm is not None and not 0 < optim.clip_norm < float("inf"):
        raise ConfigError(
            f"optim.clip_norm must be a positive number, not {optim.clip_norm}; null switches clipping off"
        )
    for name, number in (
        ("optim.momentum", optim.momentum),
        ("optim.beta1", optim.beta1),
        ("optim.beta2", optim.beta2),
    ):
        if not 0 <= number < 1:
            raise ConfigError(f"{name} must lie in 0 <= {name} < 1, not {number}")
    if config.pretrain_epochs > config.epochs:
        raise ConfigError(
            f"pretrain_epochs={config.pretrain_epochs} exceeds epochs={config.epochs}, which counts both phases; "
            f"use epochs={config.pretrain_epochs} for cross-entropy alone, or more for OAT"
        )
    usable = all(map(math.isfinite, [*data.mean, *data.std])) and all(value > 0 for value in data.std)
    if len(data.mean) != 3 or len(data.std) != 3 or not usable:
        raise ConfigError("data.mean and data.std are three numbers each, for red, green and blue; std above 0")
    if engine.name is not None:
        _choice("engine.name", engine.name, ENGINES)
    if engine.name == "ddp" and engine.deepspeed is not None:
        raise ConfigError(f"engine.name=ddp takes no engine.deepspeed={engine.deepspeed}; use zero1, zero2 or zero3")
    if engine.precision not in (None, *PRECISIONS):
        advice = "; use bf16, which needs no loss scaling" if engine.precision == "fp16" else ""
        raise ConfigError(f"engine.precision must be no or bf16, not {engine.precision!r}{advice}")
    _choice("anchor.span", anchor.span, SPANS)
    if anchor.floor is not None and not anchor.floor >= 0:
        raise ConfigError(f"anchor.floor must be at least 0, not {anchor.floor}")


def check_floor(config: Config, num_classes: int) -> None:
    """The floor's upper bound depends on the data set.

    Raises:
        ConfigError: C * floor is not below 1.
    """
    try:
        default_floor(config.anchor.center, num_classes, config.anchor.floor)
    except ValueError as error:
        raise ConfigError(f"anchor.floor={config.anchor.floor} with {num_classes} classes: {error}") from None


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}")
