"""What makes N ranks train otherwise than one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from oat_dist.models.norms import training_norms

__all__ = ["randomness"]

# Rates that networks keep as plain numbers and hand to functions: torchvision's densenet and swin, timm's classifiers.
_DROPOUT_RATES = ("dropout", "attention_dropout", "drop_rate", "attn_drop_rate", "drop_prob", "prob")


def randomness(model: nn.Module) -> list[str]:
    """Sources of difference between one rank and N in training mode, of "BatchNorm", "dropout", "stochastic depth".

    BatchNorm normalises by what its own rank holds; the others draw from the rank's own random numbers.
    """
    found = {"BatchNorm"} if training_norms(model) else set()
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("StochasticDepth", "DropPath"):  # torchvision's and timm's
            if _rate(module, "p") or _rate(module, "drop_prob"):
                found.add("stochastic depth")
        elif isinstance(module, _DropoutNd):
            if module.p > 0:
                found.add("dropout")
        elif any(_rate(module, name) for name in _DROPOUT_RATES):
            found.add("dropout")
    return sorted(found)


def _rate(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, (int, float)) and value > 0
