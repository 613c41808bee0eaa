"""BatchNorm: whose numbers enter its statistics, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["hold", "norms_frozen", "statistics_untouched", "training_norms"]


class _Held(nn.Module):
    """Mixed into a BatchNorm layer: it stays in eval mode, whoever calls ``train()`` on the network."""

    def train(self, mode: bool = True) -> _Held:
        return super().train(False)


def hold(norm: _BatchNorm) -> None:
    """Keep this layer's running statistics as they are for good: it normalises by them, in training too.

    The layer changes its class and nothing else: neither its place nor its keys. Call this after any conversion to
    SyncBatchNorm, which makes new layers.
    """
    if not isinstance(norm, _Held):
        kind = type(norm)
        norm.__class__ = type(f"Held{kind.__name__}", (_Held, kind), {})
    norm.eval()


def training_norms(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that normalise by the batch at present."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]


@contextmanager
def norms_frozen(network: nn.Module, frozen: bool) -> Iterator[None]:
    """Keep BatchNorm out of a stand-in's forward pass: it must not enter the running statistics."""
    norms = training_norms(network) if frozen else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@contextmanager
def statistics_untouched(network: nn.Module) -> Iterator[None]:
    """Forward passes as in training, bit by bit, that leave BatchNorm's running statistics and counts alone."""
    norms = [norm for norm in training_norms(network) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
