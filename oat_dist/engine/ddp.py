"""Plain data parallel: torch's DistributedDataParallel, or the bare network on one process.

The lean path: only the model goes through Accelerate. The optimizer stays raw, which costs nothing in correctness and
saves the prepared one's overhead in every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oat_dist.distributed import World
from oat_dist.engine.replica import Replica, set_learning_rate, untouched
from oat_dist.optimizer_state import check_names, load_optimizer, optimizer_tensors

__all__ = ["DataParallel"]


class DataParallel(Replica):
    """Every rank holds everything.

    Args:
        accelerator: of the engine; applies autocast and wraps in DDP when there are several ranks.
        network: as built, anywhere; moved to the device.
        optimizer: over the network's parameters.
        clip_norm: clip the global gradient norm to this; None: no clipping.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        world: World,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        self.world = world
        self.network = network
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        # Of gradients in another memory format than DDP's buckets: they are copied, which is right.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self._model = accelerator.prepare_model(network)

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def forward_only(self) -> nn.Module:
        return self.network  # with its autocast, but without DDP's exchanges

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        if isinstance(self._model, DistributedDataParallel) and not last:
            with self._model.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor | None:
        set_learning_rate(self.optimizer.param_groups, lr)
        norm = None
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def warm_up(self, images_BCHW: Tensor) -> None:
        """DDP rebuilds its gradient buckets after the first backward pass; on three or more ranks that changes the
        order of the sums."""
        if not isinstance(self._model, DistributedDataParallel):
            return
        with untouched(self.network, self.world.device):
            for _ in range(2):
                (self._model(images_BCHW).sum() * 0).backward()
        self._model.zero_grad(set_to_none=True)

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def weights(self) -> dict[str, Tensor]:
        return self.network.state_dict() if self.world.is_main else {}

    def optimizer_state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.network) if self.world.is_main else {}

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        check_names(shapes, weights, optimizer_state)
        self.network.load_state_dict(dict(weights))
        load_optimizer(self.optimizer, self.network, optimizer_state)

    def is_finite(self) -> bool:
        # All ranks hold the same weights, so all come to the same answer.
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.network.parameters()]).all())

    def close(self) -> None:
        pass
