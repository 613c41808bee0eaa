"""Whether the processes that were started see each other, and how fast they exchange numbers."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import torch

from oat_dist.distributed import World
from oat_dist.doctor.launch import Launch, interfaces
from oat_dist.doctor.looks import Place, Trouble, by_node, ranks_text
from oat_dist.doctor.rows import FAIL, PASS, SKIP, WARN, Row

__all__ = ["Speed", "judge_processes", "judge_speed", "loopback_name", "measure"]

_SLOW_SECONDS, _SLOW_BYTES = 0.010, 100e6
_LARGE = 32 << 20
_SMALL = 1 << 20
_BUDGET_SECONDS = 2.0  # for each of the two measurements


def judge_processes(launch: Launch, places: Sequence[Place], loopback: Sequence[bool]) -> list[Row]:
    """Those that were started against those that see each other.

    Args:
        loopback: whether each rank's machine believes that its own name is 127.x (`loopback_name`).
    """
    nodes = by_node(places)
    seen = f"{len(places)} process(es) on {len(nodes)} node(s): {ranks_text(places)}"
    rows = []
    for what, count, there in (("tasks", launch.tasks, len(places)), ("nodes", launch.nodes, len(nodes))):
        if count > there:
            rows.append(
                Row(
                    "processes",
                    WARN,
                    f"{seen}; the scheduler's step has {count} {what}",
                    "start one task for each process, or one for each node with a launcher in it",
                )
            )
    for node, here in nodes.items():
        local = sorted(place.local_rank for place in here)
        if local != list(range(len(here))):
            rows.append(
                Row(
                    "processes",
                    FAIL,
                    f"LOCAL_RANK on {node} is {', '.join(map(str, local))}",
                    "set it to 0, 1, ... on each node: it chooses the GPU (SLURM_LOCALID)",
                )
            )
    count, said = len(nodes[launch.place.node]), launch.local_world
    if (said is not None and said != count) or (said is None and max(map(len, nodes.values())) > 1):
        rows.append(
            Row(
                "processes",
                WARN,
                f"LOCAL_WORLD_SIZE is {said or 'not set'}, and {count} processes are on {launch.place.node}",
                f"set LOCAL_WORLD_SIZE={count}: cores and memory of a machine are shared out by it",
            )
        )
    hosts = {place.host for place in places}
    bad = [place for place, wrong in zip(places, loopback, strict=True) if wrong]
    if len(hosts) > 1 and bad:
        rows.append(
            Row(
                "processes",
                WARN,
                f"the own name of {', '.join(sorted({place.host for place in bad}))} resolves to 127.x there, where "
                "gloo then waits for the other machines",
                "set GLOO_SOCKET_IFNAME to the interface that the machines share, or mend /etc/hosts",
            )
        )
    return rows or [Row("processes", PASS, seen)]


def loopback_name() -> bool:
    """Whether this machine's own name means itself alone (Debian's "127.0.1.1 host") and nothing says otherwise."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return False
    try:
        return ip_address(socket.gethostbyname(socket.gethostname())).is_loopback
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Speed:
    """`latency`: seconds for 4 bytes, median; `seconds` for `size` bytes, median. Of the slowest rank."""

    latency: float
    size: int
    seconds: float


def measure(world: World) -> Speed:
    """Every rank calls it at once."""
    latency = _timed(world, 4, 100)
    size = _SMALL
    once = _timed(world, size, 3)
    if once * (_LARGE / _SMALL) < 3 * _BUDGET_SECONDS:
        size = _LARGE
        once = _timed(world, size, 7)
    return Speed(latency, size, once)


def _timed(world: World, size: int, most: int) -> float:
    """Median seconds of an all-reduce of `size` bytes on the slowest rank."""
    tensor = torch.zeros(size // 4, device=world.device)
    first = _slowest(world, [_once(world, tensor) for _ in range(2)][-1])
    times = [_once(world, tensor) for _ in range(max(3, min(most, int(_BUDGET_SECONDS / max(first, 1e-6)))))]
    return _slowest(world, statistics.median(times))


def _once(world: World, tensor: torch.Tensor) -> float:
    started = time.perf_counter()
    world.all_reduce(tensor)
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - started


def _slowest(world: World, seconds: float) -> float:
    value = torch.tensor([seconds], device=world.device, dtype=torch.float64)
    return float(world.all_reduce(value, "max").item())


def judge_speed(speed: Speed | Trouble, places: Sequence[Place], device: str) -> Row:
    """Between machines slow means slow; within one, only the latency says anything."""
    if isinstance(speed, Trouble):
        return Row("all-reduce", FAIL, speed.found, speed.remedy)
    if len(places) == 1:
        return Row("all-reduce", SKIP, "one process exchanges nothing")
    rate = speed.size / speed.seconds
    found = (
        f"4 bytes in {_milliseconds(speed.latency)}, {speed.size >> 20} MiB in {_milliseconds(speed.seconds)} "
        f"({rate / 1e6:,.0f} MB/s), slowest rank"
    )
    several = len(by_node(places)) > 1
    slow = speed.latency > _SLOW_SECONDS or (several and rate < _SLOW_BYTES)
    if not slow:
        return Row("all-reduce", PASS, found)
    variable = "NCCL_SOCKET_IFNAME (and see NCCL_DEBUG=INFO)" if device == "cuda" else "GLOO_SOCKET_IFNAME"
    remedy = f"set {variable} to the fastest interface; here are {interfaces()}"
    return Row("all-reduce", WARN, found, remedy if several else "too many processes for the cores of this machine?")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
