"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from oat_dist.errors import ConfigError
from oat_dist.models.norms import training_norms

__all__ = ["checkpoint_activations"]


class _Checkpointed(nn.Sequential):
    """The same layers by the same names, each of which keeps its input only."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = checkpoint(layer, input, use_reentrant=False)
        return input


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let the network recompute its blocks in the backward pass; gradients stay bitwise the same, keys too.

    Call this after `freeze`.

    Raises:
        ConfigError: the network does not offer it, or its BatchNorm would see every batch twice.
    """
    if isinstance(model, VisionTransformer):
        layers = model.encoder.layers
        model.encoder.layers = _Checkpointed(OrderedDict(layers.named_children()))
        return
    if training_norms(model) and hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(
            f"model.name={name} has BatchNorm, whose running statistics would count every batch twice under gradient "
            "checkpointing; use it with networks without BatchNorm, such as the vision transformers"
        )
    switch = getattr(model, "set_grad_checkpointing", None)  # timm's
    try:
        if switch is None:
            raise AssertionError
        switch(True)
    except AssertionError as error:
        raise ConfigError(
            f"model.name={name} does not offer gradient checkpointing; torchvision's vit_* do, and most transformers "
            "of timm (timm/vit_*, timm/swin_*, timm/convnext_*)"
        ) from error
