"""A started engine: who we are among the processes, and how a network is prepared for training on them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from oat_dist.distributed import World
from oat_dist.engine import zero_config
from oat_dist.engine.ddp import DataParallel
from oat_dist.engine.launcher import Plan
from oat_dist.engine.replica import Replica
from oat_dist.engine.trackers import TrackedRun, start_trackers
from oat_dist.engine.zero import Zero
from oat_dist.engine.zero_config import BatchShape
from oat_dist.errors import LaunchError, TrainingError

__all__ = ["Engine"]

# How gloo tells that the other end of a connection is no more.
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",
)


@dataclass
class Engine:
    """What `start_engine` has started. `plan` says which engine and which precision it is."""

    accelerator: Accelerator
    world: World
    plan: Plan
    threads: int

    @property
    def name(self) -> str:
        return self.plan.engine

    @property
    def precision(self) -> str:
        return self.plan.precision

    def prepare(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: BatchShape | None = None,
        clip_norm: float | None = None,
    ) -> Replica:
        """Put a network under this engine, in this precision.

        Args:
            network: whole, with the same weights on every rank.
            optimizer: over its parameters.
            batch: what DeepSpeed is told of the batch; None: one sample. Changes no result.
            clip_norm: clip the global gradient norm to this.

        Raises:
            LaunchError: the engine made something else of it than was asked for.
        """
        if self.plan.stage == 0:
            return DataParallel(self.accelerator, self.world, network, optimizer, clip_norm)
        settings = zero_config.complete(
            self.plan.settings, self.world.size, batch or BatchShape(1, 1), clip_norm, self.precision
        )
        return Zero(self.accelerator, self.world, network, optimizer, settings)

    def start_trackers(self, names: Sequence[str], run: TrackedRun) -> list[Any]:
        """Accelerate's trackers for `run`, for the main process alone to log to and to finish; see `start_trackers`."""
        return start_trackers(self.accelerator, names, run)

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Turn a collective that failed because another rank has stopped into one line: that rank says why."""
        try:
            yield
        except RuntimeError as error:
            gone = isinstance(error, torch.distributed.DistBackendError) or any(s in str(error) for s in _PEER_IS_GONE)
            if self.world.size == 1 or not gone:
                raise
            raise LaunchError(
                f"rank {self.world.rank} stops because another rank has stopped; the reason is in that rank's output "
                f"({str(error).splitlines()[0]})"
            ) from error

    @staticmethod
    @contextmanager
    def memory(remedy: str) -> Iterator[None]:
        """Turn a GPU that runs out of memory inside the block into an error that says what to change."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"out of GPU memory; {remedy}") from error

    def close(self) -> None:
        """End the process group, so that no rank outlives the others in a collective."""
        self.accelerator.end_training()
        # gloo's threads are joined when the last reference to the group goes. Networks and optimizers refer to it in
        # circles; left to the end of the interpreter, a thread that still lets go of a tensor there aborts the process.
        atexit.register(gc.collect)
