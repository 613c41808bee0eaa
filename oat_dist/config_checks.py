"""Values that cannot work are refused here, naming the remedy."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path

from oat_dist.anchor import CENTERS, FIXED, default_floor
from oat_dist.config_keys import Config, LossConfig
from oat_dist.data.builder import ON_BAD
from oat_dist.data.decoded_cache import DECODED_CACHES
from oat_dist.data.images.pipeline import EVAL_CROPS, TRAIN_CROPS, parse_augment
from oat_dist.data.mixing import MAX_ALPHA, MIN_ALPHA, MIXES
from oat_dist.data.remote.fetch import is_url, shown
from oat_dist.engine.launcher import ENGINES, PRECISIONS
from oat_dist.engine.trackers import parse_trackers
from oat_dist.errors import ConfigError
from oat_dist.evaluate import PROTOCOLS
from oat_dist.oat_loss import SCOPES
from oat_dist.objectives import CLASS_WEIGHTS
from oat_dist.optim import OPTIMIZERS, SCHEDULES
from oat_dist.profiling import parse_steps
from oat_dist.stopping import signal_numbers
from oat_dist.window_step import SPANS

__all__ = ["check", "check_floor"]


def check(config: Config) -> None:
    """Refuse what cannot work, naming the remedy."""
    data, optim, anchor, engine = config.data, config.optim, config.anchor, config.engine
    _choice("data.on_bad", data.on_bad, ON_BAD)
    _check_data(config)
    _choice("optim.name", optim.name, OPTIMIZERS)
    _choice("optim.schedule", optim.schedule, SCHEDULES)
    _choice("anchor.center", anchor.center, CENTERS)
    _choice("anchor.scope", anchor.scope, SCOPES)
    _check_loss(config)
    own = ("balanced",) if config.anchor.center == "prior" else ()
    if config.eval.protocol == "balanced" and not own:
        raise ConfigError("eval.protocol=balanced needs anchor.center=prior, whose anchor is a class prior")
    _choice("eval.protocol", config.eval.protocol, (*PROTOCOLS, *own))
    if config.start_from is not None and Path(config.start_from).absolute() == Path(config.output_dir).absolute():
        raise ConfigError("start_from is output_dir itself; a run goes on from its own checkpoints without it")
    needs_path = data.mode == "shards" or data.eval_split is not None
    for name, text in (("output_dir", config.output_dir), ("data.path", data.path)):
        if not text and (needs_path or name != "data.path"):
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
        ("data.shuffle_shards", data.shuffle_shards, 1),
        ("data.stream.samples", data.stream.samples, 0),
        ("data.stream.classes", data.stream.classes, 0),
        ("data.stream.shuffle", data.stream.shuffle, 1),
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
        ("optim.oat_lr_scale", optim.oat_lr_scale),
        ("engine.timeout_minutes", engine.timeout_minutes),
        ("job.check_seconds", config.job.check_seconds),
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
    if optim.ema is not None and not 0 < optim.ema < 1:
        raise ConfigError(f"optim.ema must lie in 0 < optim.ema < 1, not {optim.ema}; null: no average")
    if config.pretrain_epochs > config.epochs:
        raise ConfigError(
            f"pretrain_epochs={config.pretrain_epochs} exceeds epochs={config.epochs}, which counts both phases; "
            f"use epochs={config.pretrain_epochs} for cross-entropy alone, or more for OAT"
        )
    usable = all(map(math.isfinite, [*data.mean, *data.std])) and all(value > 0 for value in data.std)
    if len(data.mean) != 3 or len(data.std) != 3 or not usable:
        raise ConfigError("data.mean and data.std are three numbers each, for red, green and blue; std above 0")
    signal_numbers(config.job.stop_signals)
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
    _check_log(config)


def _check_log(config: Config) -> None:
    log = config.log
    parse_trackers(log.trackers)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}", log.project):
        raise ConfigError(
            "log.project is a name of letters, digits, spaces, _, . and -, beginning with a letter or digit, "
            f"not {log.project!r}"
        )
    if log.profile_steps is not None:
        parse_steps(log.profile_steps)
    elif log.profile_all_ranks:
        raise ConfigError("log.profile_all_ranks needs log.profile_steps, the first and the last step, such as 10-15")


def _check_data(config: Config) -> None:
    data, stream = config.data, config.data.stream
    _choice("data.mode", data.mode, ("shards", "stream"))
    if is_url(data.path) and "@" in data.path.partition("://")[2].partition("?")[0]:
        raise ConfigError(
            f"data.path={shown(data.path)} is given with a user name or password, which would stand in config.yaml; "
            "put them into ~/.netrc (http) or the environment (s3, gs)"
        )
    _choice("data.crop", data.crop, TRAIN_CROPS)
    _choice("data.eval_crop", data.eval_crop, EVAL_CROPS)
    _choice("data.mix", data.mix, MIXES)
    _choice("data.decoded_cache", data.decoded_cache, DECODED_CACHES)
    parse_augment(data.augment)
    for name, pair, most in (("crop_scale", data.crop_scale, 1.0), ("crop_ratio", data.crop_ratio, math.inf)):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or math.isinf(pair[1]):
            limit = ", at most 1" if most == 1 else ""
            raise ConfigError(f"data.{name} is two numbers above 0{limit}, the smaller first, not {list(pair)}")
    if not 0 < data.crop_fraction <= 1:
        raise ConfigError(f"data.crop_fraction must be above 0 and at most 1, not {data.crop_fraction}")
    if not MIN_ALPHA <= data.mix_alpha <= MAX_ALPHA:
        raise ConfigError(f"data.mix_alpha must be from {MIN_ALPHA:g} to {MAX_ALPHA:g}, not {data.mix_alpha}")
    if data.cache_gb is not None and not 0 < data.cache_gb < math.inf:
        raise ConfigError(f"data.cache_gb must be a positive number, not {data.cache_gb}; null: no limit")
    if data.mix != "none":
        if config.pretrain_epochs == 0:
            raise ConfigError(
                f"data.mix={data.mix} mixes labels, which OAT has no targets for, and pretrain_epochs=0 leaves no "
                "cross-entropy epoch to use it in; use data.mix=none"
            )
        if config.anchor.span == "step":
            raise ConfigError(
                f"data.mix={data.mix} keeps pairs of samples in one micro-batch, which anchor.span=step may cut; use "
                "anchor.span=micro or data.mix=none"
            )
    if data.mode == "stream":
        if not stream.urls or not stream.samples:
            raise ConfigError(
                "data.mode=stream needs data.stream.urls, and data.stream.samples: what counts as an epoch"
            )
        if data.eval_split is None and not stream.classes:
            raise ConfigError(
                "data.mode=stream without data.eval_split needs data.stream.classes, the number of classes"
            )
        for name, value in (("mix", data.mix), ("decoded_cache", data.decoded_cache)):
            if value != "none":
                raise ConfigError(f"data.{name}={value} needs data.mode=shards: a stream has no fixed samples")
        if data.shuffle_shards is not None:
            raise ConfigError("data.shuffle_shards needs data.mode=shards; a stream has data.stream.shuffle")
    elif stream.urls:
        raise ConfigError("data.stream.urls is for data.mode=stream; data.mode=shards reads data.path")


def _check_loss(config: Config) -> None:
    loss, anchor = config.loss, config.anchor
    _choice("loss.class_weights", loss.class_weights, CLASS_WEIGHTS)
    if not 0 <= loss.label_smoothing < 1:
        raise ConfigError(f"loss.label_smoothing must be at least 0 and below 1, not {loss.label_smoothing}")
    if not math.isfinite(loss.logit_adjustment):
        raise ConfigError(f"loss.logit_adjustment must be a number, not {loss.logit_adjustment}")
    if loss.logit_adjustment and loss.class_weights != "none":
        raise ConfigError("loss.logit_adjustment and loss.class_weights balance the classes twice; use one of them")
    if config.data.mode == "stream" and (loss.logit_adjustment or loss.class_weights != "none"):
        raise ConfigError("loss.logit_adjustment and loss.class_weights need data.mode=shards: a stream has no counts")
    if loss != LossConfig() and config.pretrain_epochs == 0:
        raise ConfigError("loss.* is of the cross-entropy epochs, and pretrain_epochs=0 leaves none; set these back")
    if not 0 <= anchor.momentum < 1:
        raise ConfigError(f"anchor.momentum must lie in 0 <= anchor.momentum < 1, not {anchor.momentum}")
    if anchor.momentum and anchor.scope != "global":
        raise ConfigError(
            f"anchor.momentum={anchor.momentum} is of one anchor that all ranks share; use anchor.scope=global "
            "(on one process it is the same as device)"
        )
    if anchor.momentum and anchor.center in FIXED:
        raise ConfigError(f"anchor.momentum: the anchor of anchor.center={anchor.center} is fixed already; leave it 0")
    if anchor.grad and (anchor.momentum or anchor.center in FIXED):
        raise ConfigError("anchor.grad=true: no gradient flows through a fixed anchor or a running mean; leave it null")


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
