"""What training needs of a network that an engine has prepared: the same few things from every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oat_dist.distributed import World

__all__ = ["Replica"]


class Replica(ABC):
    """A prepared network with its optimizer.

    Gradients are averaged over the ranks, so a loss carries a factor W (`OATLoss` and every `Objective` do).
    State goes in and out by parameter name, whole and in fp32, whatever the engine keeps on which rank: that is what
    makes a checkpoint of one engine continue under another.

    Attributes:
        network: the module within: names, buffers, structure. Its parameters may be empty shards (ZeRO-3).
        world: the processes.
    """

    network: nn.Module
    world: World

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """What to call in a forward pass that a backward pass follows."""

    @property
    @abstractmethod
    def forward_only(self) -> nn.Module:
        """What to call without gradients. Every rank must call it equally often."""

    @abstractmethod
    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; gradients are exchanged in the `last` one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch."""

    @abstractmethod
    def step(self, lr: float) -> Tensor | None:
        """One optimizer update at learning rate `lr` (times each group's own ``lr_scale``); then no gradients are left.

        Returns:
            The global gradient norm before clipping, where the replica clips; else None.

        Raises:
            TrainingError: the engine refused the step, because gradients are not finite.
        """

    @abstractmethod
    def warm_up(self, images_BCHW: Tensor) -> None:
        """Discarded passes before the first step that leave weights, buffers and random numbers as they were.

        Engines change the order of their sums, or make their state, in the first steps; after this a resumed run has
        nothing left in which it could differ.
        """

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Forget momentum and moments, as if no step had been taken."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole state dict, in fp32 on the CPU; complete on rank 0 only. Every rank must call it."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """``{"<state>/<parameter>": tensor}`` as in `oat_dist.optimizer_state`; like `weights`."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """The reverse of `weights` and `optimizer_state`; every rank calls it with the same tensors.

        Raises:
            CheckpointError: tensors of another network; on every rank, before anything has changed.
        """

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether every parameter is finite; the same answer on all ranks. Every rank must call it."""

    def sync_buffers(self) -> None:
        """Give every rank rank 0's buffers (BatchNorm statistics), so that all evaluate and save the same network."""
        for buffer in self.network.buffers():
            self.world.broadcast_(buffer)

    @abstractmethod
    def close(self) -> None:
        """Let go of memory and hooks; the replica is of no use afterwards."""


def set_learning_rate(groups: list[dict[str, object]], lr: float) -> None:
    """`lr` for every parameter group, times the group's own scale."""
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        assert isinstance(scale, float)
        group["lr"] = lr * scale


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random numbers back afterwards."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, kept in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(kept)
