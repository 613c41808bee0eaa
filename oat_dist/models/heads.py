"""The layer that gives the class outputs, computing in fp32.

Under autocast a bf16 head would round its outputs to steps of C/256 where targets reach C - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from oat_dist.errors import ConfigError

__all__ = ["Fp32Conv2d", "Fp32Linear", "head_parameters", "head_paths", "last_layer", "replace_heads"]


class Fp32Linear(nn.Linear):
    """A linear layer that computes in its weights' precision, also inside autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with _no_autocast(input):
            return super().forward(input.to(self.weight.dtype))


class Fp32Conv2d(nn.Conv2d):
    """A convolution that computes in its weights' precision, also inside autocast: SqueezeNet's head."""

    def forward(self, input: Tensor) -> Tensor:
        with _no_autocast(input):
            return super().forward(input.to(self.weight.dtype))


def _no_autocast(input: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False)


def head_paths(model: nn.Module) -> list[str]:
    """Paths of a built network's heads: one, or several whose outputs the network averages."""
    return [path for path, module in model.named_modules() if isinstance(module, (Fp32Linear, Fp32Conv2d))]


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the heads' parameters, as in ``named_parameters``."""
    prefixes = tuple(f"{path}." for path in head_paths(model))
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def last_layer(model: nn.Module) -> str:
    """Path of the last linear layer, or of the last convolution where there is none."""
    for kind in (nn.Linear, nn.Conv2d):
        found = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return found[-1]
    raise AssertionError("a classifier without weights")


def replace_heads(model: nn.Module, paths: Sequence[str], name: str) -> None:
    """Put fp32 layers in place of those at `paths`, with the very same parameters.

    Raises:
        ConfigError: one of them is neither linear nor a 1x1 convolution.
    """
    for path in paths:
        old = model.get_submodule(path)
        head: nn.Module
        if isinstance(old, nn.Linear):
            head = Fp32Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1) and old.groups == 1:
            head = Fp32Conv2d(old.in_channels, old.out_channels, 1, bias=old.bias is not None, device="meta")
        else:
            raise ConfigError(
                f"model.name={name} ends in {type(old).__name__}, which is neither a linear layer nor a 1x1 "
                "convolution; choose another network"
            )
        head.weight, head.bias = old.weight, old.bias  # keeps the architecture's own initialisation
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, head.train(old.training))
