"""The network of the check: the user's, without what makes N ranks differ from one, and with gradients everywhere."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist.models import head_paths, randomness
from oat_dist.models.norms import hold, training_norms

__all__ = ["calibrate", "digest", "quieten", "wake_head"]

# Where layers keep the rate at which they drop something, whatever library they are from.
_RATES = ("p", "prob", "drop_prob", "drop_rate", "attn_drop_rate", "dropout", "attention_dropout")
_HEAD_STD = 0.02
# Smooth ones in place of activations with kinks; the parameters stay.
_SMOOTH: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: nn.GELU,
    nn.ReLU6: nn.GELU,
    nn.Hardtanh: nn.GELU,
    nn.LeakyReLU: nn.GELU,
    nn.Hardswish: nn.SiLU,
    nn.Hardsigmoid: nn.Sigmoid,
}


def digest(network: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def quieten(network: nn.Module) -> list[str]:
    """Fix BatchNorm's statistics, switch dropout and stochastic depth off, smooth kinks; a note on each found."""
    notes = []
    sources = randomness(network)
    for norm in training_norms(network):
        hold(norm)
    for module in network.modules():
        # An attribute p of another layer may be anything, such as the exponent of a pooling.
        drops = any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))
        for name in _RATES if drops else _RATES[1:]:
            value = getattr(module, name, None)
            if isinstance(value, (int, float)) and value > 0:
                setattr(module, name, 0.0)
    left = randomness(network)
    for source in sources:
        if source in left:
            notes.append(f"{source} could not be switched off: the ranks will differ from one process")
        elif source == "BatchNorm":
            notes.append("BatchNorm: fixed statistics in this check; in training each rank normalises by what it holds")
        else:
            notes.append(f"{source}: off in this check; in training each rank draws its own")
    if _smooth(network):
        notes.append(
            "ReLU and the like, max-pooling: smooth ones in this check, since at a kink the last bit of a sum decides "
            "on a whole gradient, and rounding would hide what is looked for"
        )
    return notes


def _smooth(network: nn.Module) -> bool:
    """Replace kinked layers; whether there were any. Functions called in a forward pass are out of reach."""
    found = False
    for module in list(network.modules()):
        for name, child in module._modules.items():
            smooth: nn.Module | None = None
            if child is not None and type(child) in _SMOOTH:
                smooth = _SMOOTH[type(child)]()
            elif isinstance(child, nn.MaxPool2d) and child.dilation in (1, (1, 1)) and not child.return_indices:
                smooth = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
            if smooth is not None:
                setattr(module, name, smooth)
                found = True
    return found


def calibrate(network: nn.Module, images_BCHW: Tensor) -> None:
    """Give BatchNorm layers that have never run the statistics of one batch: without them activations may explode."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with torch.no_grad():
        network(images_BCHW)
    for norm in norms:
        norm.training, norm.momentum = False, kept[norm]


def wake_head(network: nn.Module) -> list[str]:
    """Initialise heads that start at zero (torchvision's ViT): the layers below would have no gradients."""
    notes = []
    for path in head_paths(network):
        weight = network.get_submodule(path).get_parameter("weight")
        if not weight.any():
            nn.init.normal_(weight, std=_HEAD_STD)
            notes.append(f"{path} starts at zero: random in this check, so that the layers below have gradients")
    return notes
