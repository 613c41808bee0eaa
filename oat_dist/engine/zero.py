"""DeepSpeed ZeRO-1, 2 and 3: optimizer state, gradients and weights dealt over the ranks.

DeepSpeed owns its step. Ours are the loss scaling (it would divide by the configured accumulation even in a short last
window), the boundary of a window, and the state, which goes in and out by parameter name (`zero_state`): DeepSpeed's
pickled checkpoints are never written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from oat_dist.distributed import World
from oat_dist.engine import zero_state
from oat_dist.engine.replica import Replica, set_learning_rate, untouched
from oat_dist.errors import ConfigError, LaunchError, not_finite
from oat_dist.optimizer_state import check_names

__all__ = ["Zero", "import_deepspeed"]


def import_deepspeed(on_cpu: bool) -> Any:
    """The package, made fit for CPUs where it must run on them.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise LaunchError(
            f"DeepSpeed cannot be imported ({error}); it is for Linux: pip install deepspeed, or use engine.name=ddp"
        ) from error
    if on_cpu:
        # A shared-memory backend that DeepSpeed would compile at the first start, for over a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that newer versions of torch want written differently.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    return deepspeed


def _initialize(accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine around the network.

    Raises:
        ConfigError: settings that DeepSpeed does not take, in its own words.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        return accelerator.prepare(network, optimizer)[0]
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"DeepSpeed refuses its settings (engine.deepspeed, configs/deepspeed/): {said}") from error


def _idle_buffers(optimizer: Any, stage: int) -> list[tuple[torch.UntypedStorage, int]]:
    """Storages, with their sizes, that ZeRO-3 would keep between steps, when nothing is in them: as much as
    the shard of the weights and a bucket of `reduce_bucket_size`. Offloaded ones stay: they are pinned."""
    if stage != 3 or optimizer.offload_optimizer:
        return []
    buffers = [optimizer.grad_partitions_flat_buffer, *(bucket.buffer for bucket in optimizer.ipg_buckets.values())]
    storages = [buffer.untyped_storage() for buffer in buffers if buffer is not None]
    return [(storage, storage.nbytes()) for storage in storages]


class Zero(Replica):
    """A network under DeepSpeed.

    Args:
        accelerator: of the engine, of distributed type DEEPSPEED.
        network: as built on the CPU, whole.
        optimizer: a torch optimizer over the network's parameters; it stays the one that steps.
        settings: the complete DeepSpeed configuration (`zero_config.complete`).

    Raises:
        LaunchError: DeepSpeed made something else than what was asked for.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        world: World,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
    ) -> None:
        self.world = world
        self.network = network
        self.stage = int(settings["zero_optimization"]["stage"])
        self.clips = settings["gradient_clipping"] > 0
        self._shapes = {name: value.shape for name, value in network.state_dict().items()}
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config.clear()
        plugin.deepspeed_config.update(settings, steps_per_print=float("inf"))
        accelerator.gradient_accumulation_steps = settings["gradient_accumulation_steps"]
        accelerator.deepspeed_engine_wrapped = None  # a replica before this one has been closed
        self.engine = _initialize(accelerator, network, optimizer)
        self.optimizer = self.engine.optimizer  # DeepSpeed's, around ours
        self._check(type(optimizer))
        if self.stage == 3:
            zero_state.clear_padding(network, world)
        zero_state.share_weights(self.optimizer, self.stage)
        self._idle_buffers = _idle_buffers(self.optimizer, self.stage)

    def _check(self, asked: type[torch.optim.Optimizer]) -> None:
        stage, used = self.engine.zero_optimization_stage(), type(self.optimizer.optimizer)
        if stage != self.stage or used is not asked:
            raise LaunchError(
                f"asked DeepSpeed for ZeRO-{self.stage} with {asked.__name__}, got ZeRO-{stage} with {used.__name__}; "
                "check the DeepSpeed file (engine.deepspeed)"
            )
        if self.engine.dp_world_size != self.world.size:
            raise LaunchError(
                f"DeepSpeed shares the data over {self.engine.dp_world_size} of {self.world.size} ranks; take model "
                "and sequence parallelism out of the DeepSpeed file"
            )

    @property
    def model(self) -> nn.Module:
        return self.engine

    @property
    def forward_only(self) -> nn.Module:
        return self.engine

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        if self._idle_buffers and not self._idle_buffers[0][0].nbytes():
            for storage, size in self._idle_buffers:
                storage.resize_(size)
            self.optimizer.grad_partitions_flat_buffer.zero_()
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor | None:
        set_learning_rate(self.optimizer.param_groups, lr)
        self.engine.step()
        for storage, _ in self._idle_buffers:
            storage.resize_(0)
        if not self.engine.was_step_applied():
            raise not_finite(
                "gradients are not finite, so the optimizer did not step; lower optim.lr or set optim.clip_norm"
            )
        return torch.as_tensor(self.engine.get_global_grad_norm()) if self.clips else None

    def warm_up(self, images_BCHW: Tensor) -> None:
        """One whole step of zero gradients at learning rate 0: afterwards the optimizer has its state."""
        with untouched(self.network, self.world.device):
            with self.micro_step(last=True):
                self.backward(self.engine(images_BCHW).sum() * 0)
            self.step(0.0)
        zero_state.link_state(self.optimizer, self.stage)
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        # DeepSpeed links parameters to these tensors: they are emptied, not exchanged.
        for state in self.optimizer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def weights(self) -> dict[str, Tensor]:
        return zero_state.weights(self.network, self.stage, self.world)

    def optimizer_state(self) -> dict[str, Tensor]:
        return zero_state.optimizer_state(self.network, self.optimizer, self.world)

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        check_names(self._shapes, weights, optimizer_state)
        zero_state.check_kinds(self.optimizer, optimizer_state)
        zero_state.load_weights(self.network, self.optimizer, self.stage, self.world, weights)
        self.reset_optimizer()
        zero_state.load_optimizer_state(self.network, self.optimizer, self.stage, self.world, optimizer_state)

    def is_finite(self) -> bool:
        held = [zero_state.held(parameter) for parameter in self.network.parameters()]
        finite = bool(torch.stack([part.isfinite().all().to(self.world.device) for part in held]).all())
        return self.world.all_agree(finite)

    def close(self) -> None:
        self.engine.destroy()
