"""From a configuration to the parts of a run: network, optimizer, learning rate. (`data_parts`: its data.)"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from oat_dist.config_keys import Config
from oat_dist.data.index import ShardSet
from oat_dist.data.loader import TrainLoader
from oat_dist.data.plan import Layout, keyed_hash_int
from oat_dist.data.stream import StreamLoader, StreamSet
from oat_dist.distributed import World
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import ConfigError
from oat_dist.models import (
    build_model,
    checkpoint_activations,
    expected_preprocessing,
    fetch_weights,
    freeze,
    head_parameters,
    load_weights,
    randomness,
    takes_single_samples,
)
from oat_dist.oat_loss import OATLoss
from oat_dist.objectives import OAT, CrossEntropy
from oat_dist.optim import Schedule, build_optimizer
from oat_dist.profiling import StepProfiler, parse_steps

__all__ = [
    "build_criterion",
    "build_network",
    "build_objectives",
    "build_profiler",
    "check_layout",
    "engine_for",
    "inexact",
    "learning_rate",
    "optimizer_for",
]


def engine_for(config: Config) -> Engine:
    """Start what the configuration, and where it is silent the launcher, asks for; see `start_engine`."""
    return start_engine(
        name=config.engine.name,
        deepspeed=config.engine.deepspeed,
        precision=config.engine.precision,
        processes=config.engine.processes,
        threads=config.engine.threads,
        timeout_minutes=config.engine.timeout_minutes,
        deterministic=config.deterministic,
    )


def build_profiler(config: Config, total_steps: int, world: World, say: Callable[[str], None]) -> StepProfiler:
    """What traces the steps of log.profile_steps on this rank; without them nothing.

    Raises:
        ConfigError: the run has no such steps.
    """
    log = config.log
    steps = range(0) if log.profile_steps is None else parse_steps(log.profile_steps)
    if steps and steps[-1] > total_steps:
        raise ConfigError(f"log.profile_steps={log.profile_steps}: this run has steps 1 to {total_steps:,}")
    mine = steps if world.is_main or log.profile_all_ranks else range(0)
    return StepProfiler(mine, Path(config.output_dir) / "profile", world, say)


def build_network(
    config: Config, num_classes: int, engine: Engine, *, initial_weights: bool = True
) -> tuple[nn.Module, list[str]]:
    """The network with the same initial weights on every rank, and what the user should know of them, line by line.

    From here on each rank has random numbers of its own (dropout).

    Raises:
        OatError: on every rank, when the network cannot be what the configuration says.
    """
    world = engine.world
    world.together(_check_options, config, engine)  # a compiler may be missing on one machine only
    weights = None
    if config.model.weights is not None and initial_weights:
        # One process of each machine fills the cache of downloads; the others then find it.
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        world.together(lambda: fetch_weights(config.model.name, config.model.weights or "") if first else None)
        weights = world.together(fetch_weights, config.model.name, config.model.weights)
    torch.manual_seed(config.seed)
    network, notes = world.together(_build, config, num_classes, world, weights)
    torch.manual_seed(keyed_hash_int(config.seed, world.rank) >> 1)
    return network, notes


def _check_options(config: Config, engine: Engine) -> None:
    """Refuse what an engine would ignore.

    Raises:
        ConfigError: naming both.
    """
    model = config.model
    if config.optim.ema is not None and engine.plan.stage == 3:
        raise ConfigError("optim.ema works with ddp, zero1 and zero2; under zero3 no rank has whole weights to average")
    if model.channels_last and engine.plan.stage:
        raise ConfigError(
            f"model.channels_last works with engine.name=ddp; {engine.name} lays the weights out by itself"
        )
    if model.compile and engine.plan.stage == 3:
        raise ConfigError("model.compile works with ddp, zero1 and zero2; zero3 gathers weights between the layers")
    if model.compile and engine.world.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError("model.compile needs a C++ compiler on the CPU: install g++")


def _build(config: Config, num_classes: int, world: World, weights: Path | None) -> tuple[nn.Module, list[str]]:
    model, data, notes = config.model, config.data, []
    network = build_model(model.name, num_classes, image_size=data.image_size)
    if weights is not None:
        loaded = load_weights(network, model.name, weights, data.image_size)
        head = "with its head" if loaded.head_loaded else f"with a new head of {num_classes} classes"
        notes.append(f"weights from {loaded.source}: {loaded.tensors} tensors, {head}")
        wanted = expected_preprocessing(model.name)
        given = [*data.mean, *data.std]
        if wanted is not None and any(abs(a - b) > 0.01 for a, b in zip(given, wanted.mean + wanted.std, strict=True)):
            shown = [[round(value, 4) for value in values] for values in (wanted.mean, wanted.std)]
            notes.append(f"note: {model.name} was pretrained with data.mean={shown[0]} and data.std={shown[1]}")
    if model.sync_batchnorm and world.size > 1 and world.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if model.freeze is not None:
        frozen = freeze(network, model.freeze)
        notes.append(f"frozen: {len(frozen)} of {sum(1 for _ in network.parameters())} parameters ({model.freeze})")
    if model.gradient_checkpointing:
        checkpoint_activations(network, model.name)
    if model.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network, notes


def check_layout(config: Config, loader: TrainLoader | StreamLoader, network: nn.Module) -> None:
    """Refuse a layout that would end the first epoch in an error of BatchNorm, or hang in it.

    Raises:
        ConfigError: a rank gets a single sample in some batch, and the network cannot train on one; or none at all
            where BatchNorm needs every rank.
    """
    samples = loader.builder.shards.num_samples
    first, last = loader.layout.batch_range(loader.steps_per_epoch - 1, samples)
    dealt = loader.layout.deal(min(config.batch_size, samples)) + loader.layout.deal(last - first)
    sizes = {len(part) for micro_batch in dealt for part in micro_batch}
    remedy = "use data.drop_last=true or another batch_size or micro_batch_size"
    synchronised = any(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in network.modules())
    if 0 in sizes and synchronised:
        raise ConfigError(
            f"batch_size={config.batch_size} leaves a rank without a sample in some micro-batch of {samples:,}, but "
            f"SyncBatchNorm needs all ranks; {remedy}, or model.sync_batchnorm=false"
        )
    if config.model.compile and config.anchor.span == "step" and "dropout" in randomness(network):
        raise ConfigError(
            f"model.compile with anchor.span=step needs a network without dropout ({config.model.name} has it): its "
            "two passes are compiled apart and may draw other random numbers; use anchor.span=micro, or no compile"
        )
    if 1 in sizes and not synchronised and not takes_single_samples(network, config.data.image_size):
        raise ConfigError(
            f"batch_size={config.batch_size} leaves a rank with a single sample in some batch of {samples:,}, which "
            f"the BatchNorm of model.name={config.model.name} cannot train on; {remedy}"
        )


def inexact(config: Config, network: nn.Module, layout: Layout) -> list[str]:
    """Why this run would not end with the very parameters of one process on the joined batch, line by line."""
    accumulates = len(layout.deal(config.batch_size)) > 1
    split = [*(["ranks"] if layout.world > 1 else []), *(["micro-batches"] if accumulates else [])]
    if not split:
        return []
    notes, sources, number = [], randomness(network), f"the number of {' and '.join(split)}"
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    if synchronised and not accumulates:
        sources = [source for source in sources if source != "BatchNorm"]
    if sources:
        notes.append(
            f"note: each part of a batch has its own {' and '.join(sources)} ({config.model.name}), so the training "
            f"depends on {number}; anchors and loss are exact all the same"
        )
    anchor = config.anchor
    if config.pretrain_epochs < config.epochs:
        if anchor.scope == "device":
            of = "rank" if anchor.span == "step" or not accumulates else "micro-batch of a rank"
            notes.append(f"note: anchor.scope=device is an anchor for each {of}, so the loss depends on {number}")
        elif anchor.scope == "global" and anchor.span == "micro" and accumulates:
            notes.append(
                "note: anchor.span=micro is an anchor for each micro-batch, so the loss depends on micro_batch_size; "
                "anchor.span=step is one for the whole batch"
            )
    return notes


def build_criterion(config: Config, num_classes: int) -> OATLoss:
    anchor = config.anchor
    return OATLoss(
        *(num_classes, anchor.center, anchor.scope, anchor.group_size, anchor.grad, anchor.floor),
        momentum=anchor.momentum,
    )


def build_objectives(config: Config, train_set: ShardSet | StreamSet, criterion: OATLoss) -> tuple[CrossEntropy, OAT]:
    """Of the two phases.

    Raises:
        ConfigError: classes are to be balanced, and one has no image.
    """
    loss = config.loss
    if not loss.logit_adjustment and loss.class_weights == "none":
        return CrossEntropy(loss.label_smoothing), OAT(criterion)
    assert isinstance(train_set, ShardSet)
    shares_C = torch.tensor(train_set.class_shares, dtype=torch.float64)
    if 0 in train_set.class_shares:
        name = train_set.classes[train_set.class_shares.index(0)]
        raise ConfigError(f"loss: classes cannot be balanced, {train_set.where} has no image of {name!r}")
    offset_C = loss.logit_adjustment * shares_C.log() if loss.logit_adjustment else None
    weight_C = 1 / (len(shares_C) * shares_C) if loss.class_weights == "balanced" else None  # mean over samples: 1
    return CrossEntropy(loss.label_smoothing, offset_C, weight_C), OAT(criterion)


def optimizer_for(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    optim = config.optim
    return build_optimizer(
        network,
        optim.name,
        optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        head=head_parameters(network),
        head_lr_scale=optim.head_lr_scale,
    )


def learning_rate(config: Config, steps_per_epoch: int) -> Schedule:
    """Over all epochs; where `max_steps` stops a run earlier, the rest of the schedule is still to come."""
    optim = config.optim
    return Schedule(
        optim.schedule,
        optim.lr,
        config.epochs * steps_per_epoch,
        warmup=round(optim.warmup_epochs * steps_per_epoch),
        step_length=max(round(optim.step_epochs * steps_per_epoch), 1),
        gamma=optim.step_gamma,
        final_lr=optim.final_lr,
        switch=config.pretrain_epochs * steps_per_epoch,
        later_scale=optim.oat_lr_scale,
    )
