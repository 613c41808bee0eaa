"""Optimizers, and learning rates as pure functions of the global step."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from oat_dist.errors import ConfigError

__all__ = ["OPTIMIZERS", "SCHEDULES", "Schedule", "build_optimizer"]

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine", "step")


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    head: Collection[str] = (),
    head_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; norms and biases (parameters of fewer than two dimensions) are not decayed.

    Args:
        head, head_lr_scale: parameters of these names get this ``lr_scale`` in their groups; the engine multiplies
            the learning rate by it.

    Raises:
        ConfigError: another name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scaled = set(head) if head_lr_scale != 1 else set()  # no more groups than there must be: engines reduce by group
    groups = [
        {
            "params": [p for name, p in trainable if (p.ndim >= 2) == decayed and (name in scaled) == in_head],
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": head_lr_scale if in_head else 1.0,
        }
        for in_head in (False, True)
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


@dataclass(frozen=True)
class Schedule:
    """The learning rate at any global step; all lengths in steps.

    `kind` is "constant", "cosine" (from `lr` to `final_lr` over the steps after warm-up) or "step" (times `gamma`
    every `step_length` steps). During the first `warmup` steps the rate rises linearly from lr/(warmup + 1).
    From step `switch` on all of it is times `later_scale`: the OAT epochs may need another rate.
    """

    kind: str
    lr: float
    total: int
    warmup: int = 0
    step_length: int = 1
    gamma: float = 0.1
    final_lr: float = 0.0
    switch: int = 0
    later_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, not {self.kind!r}")

    def __call__(self, step: int) -> float:
        return self._scheduled(step) * (self.later_scale if step >= self.switch else 1.0)

    def _scheduled(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.kind == "cosine":
            progress = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
            return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "step":
            return self.lr * self.gamma ** (step // self.step_length)
        return self.lr
