"""Weights and optimizer state of a network under ZeRO, whole and by parameter name, in both directions.

DeepSpeed's own checkpoints are pickles of flat partitions, bound to the world size; its converter knows AdamW only.
Here every parameter's weights and state are assembled from the partitions on the way out, and dealt out again on the
way in. Works for stages 1 to 3, for SGD and AdamW, with and without offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oat_dist.distributed import World
from oat_dist.errors import CheckpointError

__all__ = [
    "check_kinds",
    "clear_padding",
    "held",
    "link_state",
    "load_optimizer_state",
    "load_weights",
    "optimizer_state",
    "share_weights",
    "weights",
]

_STEP = "step"  # AdamW counts steps in each state; every parameter has the same count


def share_weights(optimizer: Any, stage: int) -> None:
    """Let DeepSpeed's master weights be the fp32 weights themselves instead of a second copy of them.

    DeepSpeed keeps masters apart because the weights may be of lower precision; ours are fp32 (bf16 is autocast), so
    the copies would always be equal. Saves 4 bytes a parameter over W. Where the masters are offloaded they stay.
    """
    if stage == 3:
        masters, parts = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    else:
        masters = optimizer.single_partition_of_fp32_groups
        ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
        partitions = optimizer.parallel_partitioned_bit16_groups
        parts = [group[rank] for group, rank in zip(partitions, ranks, strict=True)]
    for master, part in zip(masters, parts, strict=True):
        if part is not None and part.device == master.device:
            assert part.dtype == master.dtype == torch.float32 and part.shape == master.shape
            master.data = part.data
    if stage != 3:
        optimizer._link_all_hp_params()  # they held views of the old masters


def clear_padding(network: nn.Module, world: World) -> None:
    """Fill what pads ZeRO-3's partitions to equal size with zeros: DeepSpeed leaves there whatever the memory held.

    The optimizer steps over it too, so a NaN would spread into its state, and be taken for a diverged network.
    """
    for parameter in network.parameters():
        part = held(parameter)
        whole = getattr(parameter, "ds_numel", parameter.numel())
        part.data[min(max(whole - world.rank * part.numel(), 0), part.numel()) :] = 0


def link_state(optimizer: Any, stage: int) -> None:
    """Let parameters know their optimizer state, once all of it exists.

    Under stages 1 and 2 DeepSpeed does so after the first group's first step, when other groups have no state yet.
    """
    if stage != 3:
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def weights(network: nn.Module, stage: int, world: World) -> dict[str, Tensor]:
    """The whole state dict on the CPU of rank 0; elsewhere empty. Collective under ZeRO-3."""
    whole = {}
    for name, value in network.state_dict(keep_vars=True).items():
        with _gathered(value, stage):
            if world.is_main:
                whole[name] = value.detach().cpu().clone()
    return whole


def optimizer_state(network: nn.Module, optimizer: Any, world: World) -> dict[str, Tensor]:
    """The whole optimizer state on the CPU of rank 0; elsewhere empty. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    kinds, steps = _kinds(optimizer)
    whole = {}
    for name, parameter in _trained(network):
        for kind in kinds:
            value = safe_get_full_optimizer_state(parameter, kind)
            if world.is_main:
                whole[f"{kind}/{name}"] = value.detach().cpu().clone()
        if world.is_main and steps is not None:
            whole[f"{_STEP}/{name}"] = steps.detach().cpu().clone()
    return whole


def load_weights(network: nn.Module, optimizer: Any, stage: int, world: World, tensors: Mapping[str, Tensor]) -> None:
    """Write a whole state dict into the partitions; rank 0's tensors count."""
    with torch.no_grad():
        for name, value in network.state_dict(keep_vars=True).items():
            with _gathered(value, stage, modified=True):
                if stage != 3 or world.is_main or not hasattr(value, "ds_id"):
                    value.copy_(tensors[name])
    optimizer.refresh_fp32_params()  # masters that are apart: offloaded ones


def check_kinds(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse optimizer state that is not this optimizer's.

    Raises:
        CheckpointError: of another optimizer, or of parameters that have taken different numbers of steps.
    """
    kinds, steps = _kinds(optimizer)
    given = {key.partition("/")[0] for key in tensors}
    if given and given != {*kinds, *([_STEP] if steps is not None else [])}:
        raise CheckpointError(
            f"the checkpoint has optimizer state {', '.join(sorted(given))}, this optimizer has "
            f"{', '.join(kinds) or 'none'}; check optim.name"
        )
    counts = _counts(tensors)
    if len(counts) > 1:
        raise CheckpointError(f"the checkpoint's parameters have taken different numbers of steps: {sorted(counts)}")


def _counts(tensors: Mapping[str, Tensor]) -> set[int]:
    return {int(value) for key, value in tensors.items() if key.startswith(f"{_STEP}/")}


def load_optimizer_state(
    network: nn.Module, optimizer: Any, stage: int, world: World, tensors: Mapping[str, Tensor]
) -> None:
    """Write whole optimizer state into the partitions, which must exist (`Zero.warm_up`)."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    kinds, _ = _kinds(optimizer)
    for name, parameter in _trained(network):
        for kind in kinds:
            value = tensors.get(f"{kind}/{name}")
            if value is None:  # a parameter that has had no gradient yet
                continue
            if stage == 3:
                part = _partition(value, held(parameter).numel(), world.rank)
                safe_set_local_optimizer_state(parameter, part, kind)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)
    counts = _counts(tensors)
    for state in optimizer.optimizer.state.values():
        if counts and _STEP in state:
            state[_STEP].fill_(next(iter(counts)))


def held(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter between steps: its partition under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def _trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


def _kinds(optimizer: Any) -> tuple[list[str], Tensor | None]:
    """Names of the state tensors that each parameter has, and the step count if the optimizer keeps one.

    In the same order on every rank: they are asked for in collectives, and the order of a set is a process's own.
    """
    kinds: set[str] = set()
    steps = None
    for state in optimizer.optimizer.state.values():
        kinds |= {key for key, value in state.items() if isinstance(value, Tensor) and key != _STEP}
        steps = state.get(_STEP, steps)
    return sorted(kinds), steps


def _partition(value: Tensor, size: int, rank: int) -> Tensor:
    """This rank's part of a flattened tensor, padded with zeros to `size`."""
    part = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


@contextmanager
def _gathered(value: Tensor, stage: int, *, modified: bool = False) -> Iterator[None]:
    """Make a parameter whole for a moment; with `modified`, rank 0's changes are dealt out again."""
    if stage != 3 or not hasattr(value, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([value], modifier_rank=0 if modified else None):
        yield
