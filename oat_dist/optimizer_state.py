"""Optimizer state by parameter name, so that no grouping, sharding or engine shows in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oat_dist.errors import CheckpointError

__all__ = ["check_names", "load_optimizer", "optimizer_tensors"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """``{"momentum_buffer/<parameter>": tensor}``, of the parameters that have state."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`, onto the parameters' device (step counters stay on the CPU).

    Raises:
        CheckpointError: state of a parameter that the network does not have.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise _lacks(name)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.clone() if kind == "step" else value.to(parameter.device, copy=True)


def check_names(
    shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are not of this network.

    Args:
        shapes: of its whole state dict, by name.

    Raises:
        CheckpointError: naming the first one.
    """
    another = "the checkpoint is of another network"
    for name in sorted(shapes.keys() ^ weights.keys()):
        who = "the checkpoint" if name in shapes else "the network"
        raise CheckpointError(f"{another}: {who} lacks {name}; check model.name")
    for name, value in weights.items():
        if value.shape != shapes[name]:
            raise CheckpointError(
                f"{another}: {name} has shape {tuple(value.shape)} there and {tuple(shapes[name])} here; "
                "check model.name and the number of classes"
            )
    for key, value in optimizer_state.items():
        kind, _, name = key.partition("/")
        if name not in shapes:
            raise _lacks(name)
        if kind != "step" and value.shape != shapes[name]:
            raise CheckpointError(f"{another}: {key} has shape {tuple(value.shape)}, {name} {tuple(shapes[name])}")


def _lacks(name: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint has optimizer state for {name!r}, which the network lacks")
