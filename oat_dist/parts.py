"""From a configuration to the parts of a run: data, network, optimizer, learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from oat_dist.config import Config, check_floor
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.loader import BatchBuilder, TrainLoader
from oat_dist.data.plan import Layout, keyed_hash_int
from oat_dist.data.transforms import Normalise
from oat_dist.distributed import World
from oat_dist.errors import ConfigError, DataError
from oat_dist.models import build_model, takes_single_samples
from oat_dist.oat_loss import OATLoss
from oat_dist.optim import Schedule, build_optimizer

__all__ = [
    "DataParts",
    "build_criterion",
    "build_data",
    "build_network",
    "check_single_samples",
    "learning_rate",
    "optimizer_for",
]


@dataclass(frozen=True)
class DataParts:
    """The opened splits and what turns the training split into batches on the device."""

    train_set: ShardSet
    eval_set: ShardSet | None
    loader: TrainLoader
    normalise: Normalise

    @property
    def builder(self) -> BatchBuilder:
        return self.loader.builder


def build_data(config: Config, world: World) -> DataParts:
    """Open the splits and deal the training split over the ranks.

    Raises:
        OatError: on every rank, when data and configuration do not fit together.
    """
    data, root = config.data, Path(config.data.path)
    train_set: ShardSet = world.together(open_split, root / data.train_split)
    eval_set = None
    if data.eval_split is not None:
        eval_set = world.together(open_split, root / data.eval_split)
        if eval_set.classes != train_set.classes:
            raise DataError(
                f"{root}: {data.train_split} and {data.eval_split} differ in their classes; pack them together"
            )
    check_floor(config, len(train_set.classes))
    layout = Layout(
        config.batch_size,
        world.size,
        config.micro_batch_size,
        unit=config.anchor.group_size if config.anchor.scope == "group" else 1,
        drop_last=data.drop_last,
    )
    builder = BatchBuilder(
        train_set,
        data.image_size,
        on_bad=data.on_bad,
        max_bad=data.max_bad,
        pin_memory=world.device.type == "cuda",
    )
    loader = TrainLoader(builder, layout, world.rank, config.seed, data.augment, data.workers, data.prefetch)
    return DataParts(train_set, eval_set, loader, Normalise(data.mean, data.std, world.device))


def build_network(config: Config, num_classes: int, world: World, *, initial_weights: bool = True) -> nn.Module:
    """The network with the same initial weights on every rank, and random numbers of its own (dropout) from here on."""
    torch.manual_seed(config.seed)
    network: nn.Module = world.together(
        build_model,
        config.model.name,
        num_classes,
        config.model.weights if initial_weights else None,
        config.data.image_size,
    )
    torch.manual_seed(keyed_hash_int(config.seed, world.rank) >> 1)
    return network


def check_single_samples(config: Config, loader: TrainLoader, network: nn.Module) -> None:
    """Refuse a layout that would end the first epoch in a BatchNorm error.

    Raises:
        ConfigError: a rank gets a single sample in some batch, and the network cannot train on one.
    """
    samples = loader.builder.shards.num_samples
    first, last = loader.layout.batch_range(loader.steps_per_epoch - 1, samples)
    dealt = loader.layout.deal(min(config.batch_size, samples)) + loader.layout.deal(last - first)
    alone = any(len(part) == 1 for micro_batch in dealt for part in micro_batch)
    if alone and not takes_single_samples(network, config.data.image_size):
        raise ConfigError(
            f"batch_size={config.batch_size} leaves a rank with a single sample in some batch of {samples:,}, which "
            f"the BatchNorm of model.name={config.model.name} cannot train on; use data.drop_last=true or another "
            "batch_size or micro_batch_size"
        )


def build_criterion(config: Config, num_classes: int) -> OATLoss:
    anchor = config.anchor
    return OATLoss(num_classes, anchor.center, anchor.scope, anchor.group_size, anchor.grad, anchor.floor)


def optimizer_for(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    optim = config.optim
    return build_optimizer(
        network,
        optim.name,
        optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
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
    )
