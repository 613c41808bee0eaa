"""An exponential moving average of the weights (`optim.ema`), which is evaluated and saved in their place.

After every optimizer step ``e = d * e + (1 - d) * w``, over parameters and floating-point buffers (BatchNorm's
statistics), in their own precision, which is fp32; what is counted is taken over as it is. At first
``d = min(decay, (1 + t) / (10 + t))`` after t updates, so that the initial weights are soon forgotten. It is a function
of the weights alone, so all ranks compute the same one without talking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Follows the weights of a network that every rank holds whole.

    Args:
        network: on its device; its tensors are averaged in place of it, by the names of its state dict.
        decay: d, above 0 and below 1; None: there is no average, and nothing is kept or computed.

    Attributes:
        updates: how many there have been.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        state = {} if decay is None else network.state_dict(keep_vars=True)
        self._weights = {name: value for name, value in state.items() if value.is_floating_point()}
        self._averages = {name: value.detach().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer has stepped."""
        if self.decay is not None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_([*self._averages.values()], [*self._weights.values()], 1 - decay)
            self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averages for its weights meanwhile, and then its weights again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self._weights.items():  # one by one: no second copy of everything
            kept = value.clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict `weights` with the averages in it; what is not averaged stays, and so does an empty one."""
        return {name: self._averages.get(name, value) for name, value in weights.items()}

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """The reverse of `of`, with the number of `updates` so far; of the network's own names and shapes."""
        self.updates = updates
        for name, value in self._averages.items():
            value.copy_(averages[name])
