"""The one place that makes the Accelerator: devices, processes, data parallelism, precision.

Accelerate falls back silently (to one process, or to ranks that do not see each other) when the launcher and the
environment disagree. So after start-up the engine and the number of processes are compared with what was asked for,
and a difference is an error.

The lean path: only the model is prepared. Optimizer, schedule and loader stay raw, which costs nothing in
correctness and saves the prepared ones' overhead in every step.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oat_dist.distributed import World
from oat_dist.errors import LaunchError, TrainingError

__all__ = ["Engine", "start_engine"]

_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# What launchers say of the number of tasks in a step, where they start processes but no torch rendezvous.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

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
    """A started data-parallel engine: `world` says who we are, `precision` is "no" or "bf16"."""

    accelerator: Accelerator
    world: World
    precision: str
    threads: int

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move to the device, run under autocast when in bf16, and wrap in DDP when there are several ranks."""
        return self.accelerator.prepare_model(model)

    @staticmethod
    def unwrap(model: nn.Module) -> nn.Module:
        """The network inside, with its autocast but without gradient synchronisation."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    @contextlib.contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; gradients are exchanged in the `last` one only."""
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield

    def warm_up(self, model: nn.Module, images_BCHW: Tensor) -> None:
        """Two discarded backward passes, leaving parameters, buffers and random numbers as they were.

        DDP rebuilds its gradient buckets after the first one; on three or more ranks that changes the order of the
        sums, so a resumed run would differ from the undisturbed one in its first step.
        """
        if not isinstance(model, DistributedDataParallel):
            return
        buffers = [buffer.clone() for buffer in model.buffers()]
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for _ in range(2):
                (model(images_BCHW).sum() * 0).backward()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, kept in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(kept)

    @contextlib.contextmanager
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
    @contextlib.contextmanager
    def memory(remedy: str) -> Iterator[None]:
        """Turn a GPU that runs out of memory inside the block into an error that says what to change."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"out of GPU memory; {remedy}") from error

    def sync_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm statistics), so that all evaluate and save the same network."""
        for buffer in model.buffers():
            self.world.broadcast_(buffer)

    def close(self) -> None:
        """End the process group, so that no rank outlives the others in a collective."""
        self.accelerator.end_training()


def start_engine(
    *,
    precision: str | None = None,
    processes: int | None = None,
    threads: int | None = None,
    timeout_minutes: float = 30.0,
    deterministic: bool = False,
) -> Engine:
    """Start Accelerate and check that it is what was asked for.

    Args:
        precision: "no" or "bf16"; None: what the launcher says.
        processes: the number of processes there must be; None: what the launcher started.
        threads: CPU threads of each process; None: its share of the cores.

    Raises:
        LaunchError: another engine, precision or number of processes than asked for; ranks that do not see each
            other. Names the remedy.
    """
    for variable, engine in _OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise LaunchError(
                f"the launcher asks for {engine} ({variable}), the config for engine.name=ddp; "
                "launch with one of configs/accelerate/"
            )
    chosen = _precision(precision)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    share = _threads(threads)
    if cpu:
        # Without the variable a torchrun or accelerate launch without GPUs starts ranks that do not see each other.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
    elif local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
            "processes as GPUs (--num_processes), or set ACCELERATE_USE_CPU=true to train on the CPU"
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=chosen,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout_minutes))],
    )
    if cpu or threads is not None:
        torch.set_num_threads(share)
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        device=accelerator.device,
    )
    _check(accelerator, world, asked, processes)
    return Engine(accelerator, world, chosen, torch.get_num_threads())


def _precision(asked: str | None) -> str:
    """The precision of config and launcher. The launcher's "no" is its default and so says nothing."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher not in ("no", "bf16"):
        raise LaunchError(f"the launcher asks for mixed precision {launcher!r}; use bf16, which needs no loss scaling")
    if asked is not None and launcher != "no" and asked != launcher:
        raise LaunchError(
            f"the config says engine.precision={asked}, the launcher --mixed_precision {launcher}; make them agree"
        )
    return asked or launcher


def _threads(asked: int | None) -> int:
    if asked is not None:
        return asked
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _check(accelerator: Accelerator, world: World, asked: int, processes: int | None) -> None:
    tasks = max(int(os.environ.get(name, "1")) for name in _TASK_COUNTS)
    if world.size != asked or (world.size == 1 and tasks > 1):
        raise LaunchError(
            f"{max(asked, tasks)} processes were started but this one sees {world.size}: they would train "
            "separately and overwrite each other; start them with accelerate launch or torchrun, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each"
        )
    if processes is not None and processes != world.size:
        raise LaunchError(
            f"engine.processes={processes}, but {world.size} process(es) are running; accelerate launch needs "
            f"--num_processes {processes} and a config file of several processes (configs/accelerate/)"
        )
    expected = {DistributedType.NO} if world.size == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in expected:
        raise LaunchError(
            f"asked for plain data parallel on {world.size} process(es), Accelerate started "
            f"{accelerator.distributed_type.value}; launch with one of configs/accelerate/"
        )
    seen = int(world.all_reduce(torch.ones(1, device=world.device)).item())
    if seen != world.size:
        raise LaunchError(f"{world.size} processes are running but only {seen} answer a collective; check the network")
