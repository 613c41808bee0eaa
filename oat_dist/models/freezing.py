"""`model.freeze`: parameters that do not learn."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist.errors import ConfigError
from oat_dist.models.heads import head_parameters
from oat_dist.models.norms import hold

__all__ = ["freeze"]


def freeze(model: nn.Module, patterns: str) -> list[str]:
    """Keep parameters as they are, and with them the statistics of BatchNorm layers that are frozen whole.

    Args:
        model: a network of `build_model`.
        patterns: globs over parameter names, space-separated (``conv1.* bn1.* layer1.*``), or ``body``: all but the
            head.

    Returns:
        Names of the parameters that no longer learn.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set(names) - set(head_parameters(model)) if patterns.strip() == "body" else _matching(names, patterns)
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in frozen]
    if not left:
        raise ConfigError(f"model.freeze={patterns!r} leaves no parameter to learn; freeze less, or 'body'")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for path, module in model.named_modules():
        # A layer without parameters of its own goes with what stands around it.
        around = module if next(module.parameters(), None) is not None else model.get_submodule(path.rpartition(".")[0])
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in around.parameters()):
            hold(module)
    return [name for name in names if name in frozen]


def _matching(names: list[str], patterns: str) -> set[str]:
    if not patterns.split():
        raise ConfigError("model.freeze is empty; give patterns such as 'layer1.*', or 'body', or null")
    frozen = set()
    for pattern in patterns.split():
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            parts = {
                ".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)
            }
            close = difflib.get_close_matches(pattern, [*names, *sorted(parts)], n=3, cutoff=0.3)
            raise ConfigError(
                f"model.freeze: {pattern!r} matches no parameter; did you mean {' or '.join(close) or names[0]}?"
            )
        frozen |= found
    return frozen
