"""Start Accelerate, and check that what came of it is what was asked for.

Accelerate falls back silently (to one process, to ranks that do not see each other, from DeepSpeed to DDP) when the
launcher and the environment disagree. So after start-up the engine and the number of processes are compared with what
was asked for, and a difference is an error.
"""

from __future__ import annotations

import datetime
import os
import socket
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs

from oat_dist.distributed import World
from oat_dist.engine.base import Engine
from oat_dist.engine.launcher import Plan, agree, is_true
from oat_dist.engine.zero import import_deepspeed
from oat_dist.errors import LaunchError

__all__ = ["start_engine"]

# What launchers say of the number of tasks in a step, where they start processes but no torch rendezvous.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class _Plugin(DeepSpeedPlugin):
    """Without the note to the transformers library, which would have to be installed for it."""

    def set_deepspeed_weakref(self) -> None:
        pass


def start_engine(
    *,
    name: str | None = None,
    deepspeed: str | None = None,
    precision: str | None = None,
    processes: int | None = None,
    threads: int | None = None,
    timeout_minutes: float = 30.0,
    deterministic: bool = False,
) -> Engine:
    """Start Accelerate and check that it is what was asked for.

    Args:
        name: "ddp", "zero1", "zero2" or "zero3"; None: what the launcher says, else ddp.
        deepspeed: a DeepSpeed JSON file; None: the launcher's, else DeepSpeed's defaults.
        precision: "no" or "bf16"; None: what the launcher says, else no.
        processes: the number of processes there must be; None: what the launcher started.
        threads: CPU threads of each process; None: its share of the cores.
        timeout_minutes: a collective that waits for a minute longer than this is an error: whoever watches for hangs
            of this length comes first.

    Raises:
        LaunchError: another engine, precision or number of processes than asked for; ranks that do not see each
            other, or do not meet. Names the remedy.
        ConfigError: an unusable DeepSpeed file.
    """
    plan = agree(name, deepspeed, precision)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cpu = is_true("ACCELERATE_USE_CPU")  # asked first: torch.cuda would look at the GPUs that we then hide
    if cpu and plan.stage:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cpu = cpu or not torch.cuda.is_available()
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    share = _threads(threads)
    if cpu:
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
    timeout = datetime.timedelta(minutes=timeout_minutes + 1)
    try:
        accelerator = _deepspeed(plan, cpu, timeout) if plan.stage else _data_parallel(plan, cpu, timeout)
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "connectFullMesh" in str(error)):
            raise
        raise LaunchError(
            f"the processes could not meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({str(error).splitlines()[0]}): one has ended while starting, or the network between them is not the one "
            "meant (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); oat-dist doctor, started likewise, says which"
        ) from error
    if cpu or threads is not None:
        torch.set_num_threads(share)
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        device=accelerator.device,
    )
    if cpu and world.device.type != "cpu":
        raise LaunchError(
            f"asked for the CPU (ACCELERATE_USE_CPU), Accelerate chose {world.device}; set CUDA_VISIBLE_DEVICES= too"
        )
    _check(accelerator, world, plan, asked, processes)
    return Engine(accelerator, world, plan, torch.get_num_threads())


def _data_parallel(plan: Plan, cpu: bool, timeout: datetime.timedelta) -> Accelerator:
    if cpu:
        # Without the variable a torchrun or accelerate launch without GPUs starts ranks that do not see each other.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return Accelerator(
        cpu=cpu,
        mixed_precision=plan.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )


def _deepspeed(plan: Plan, cpu: bool, timeout: datetime.timedelta) -> Accelerator:
    process_group: dict[str, Any] = {"timeout": timeout}
    if cpu:
        # With ACCELERATE_USE_CPU, or cpu=True, Accelerate starts plain DDP instead; without gloo each rank is alone.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["DS_ACCELERATOR"] = "cpu"
        process_group["backend"] = "gloo"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # What Accelerate would refuse beside a file, such as mixed_precision in its yaml; `agree` has looked at all of it.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    if "LOCAL_RANK" not in os.environ:  # one process that no launcher started: DeepSpeed wants a group all the same
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    import_deepspeed(cpu)
    # Autocast is DeepSpeed's own (torch_autocast): "bf16" here would cast the weights.
    return Accelerator(
        mixed_precision="no",
        deepspeed_plugin=_Plugin(hf_ds_config=dict(plan.settings), zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(**process_group)],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads(asked: int | None) -> int:
    if asked is not None:
        return asked
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _check(accelerator: Accelerator, world: World, plan: Plan, asked: int, processes: int | None) -> None:
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
    if plan.stage:
        expected = {DistributedType.DEEPSPEED}
    else:
        expected = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
        if world.size == 1:  # a launcher of one process makes a group of one, plain python none
            expected |= {DistributedType.NO}
    if accelerator.distributed_type not in expected:
        raise LaunchError(
            f"asked for engine.name={plan.engine} on {world.size} process(es), Accelerate started "
            f"{accelerator.distributed_type.value}; launch with one of configs/accelerate/"
        )
    seen = int(world.all_reduce(torch.ones(1, device=world.device)).item())
    if seen != world.size:
        raise LaunchError(f"{world.size} processes are running but only {seen} answer a collective; check the network")
