"""What the launcher has told this process, and whether rank 0 can be reached where it says.

torch waits for minutes at an address that does not resolve, and says little. Here both is tried first, with a deadline.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass

import psutil

from oat_dist.doctor.looks import Place, node_name
from oat_dist.errors import LaunchError

__all__ = ["Launch", "interfaces", "reach", "resolve"]

# What schedulers and MPI say of the number of tasks, and of this one's number, where no torch rendezvous is set up.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_TASK = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_LOCAL = ("localhost", "127.0.0.1", "::1")
_RESOLVE_SECONDS = 20.0
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Launch:
    """`tasks` and `nodes` are what a scheduler says, 1 where there is none. `speaks`: whether this one prints."""

    place: Place
    world: int
    local_world: int | None
    tasks: int
    nodes: int
    address: str
    port: int
    agent_store: bool
    speaks: bool

    @classmethod
    def read(cls) -> Launch:
        """From the environment.

        Raises:
            LaunchError: a variable that is no number, or makes no sense.
        """
        rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise LaunchError(f"RANK={rank} of WORLD_SIZE={world} makes no sense; set 0 <= RANK < WORLD_SIZE in each")
        task = next((os.environ[name] for name in _TASK if name in os.environ), "0")
        place = Place(rank, _number("LOCAL_RANK", 0), node_name(), socket.gethostname())
        return cls(
            place,
            world,
            _number("LOCAL_WORLD_SIZE", 0) or None,
            max(_number(name, 1) for name in _TASKS),
            _number("SLURM_STEP_NUM_NODES", 1),
            os.environ.get("MASTER_ADDR", ""),
            _number("MASTER_PORT", 0),
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            rank == 0 and ("RANK" in os.environ or task == "0"),
        )

    @property
    def several_nodes(self) -> bool:
        return self.nodes > 1 or (self.local_world is not None and self.local_world < self.world)

    def check_address(self) -> None:
        """Whether it can be meant.

        Raises:
            LaunchError: it is missing, does not resolve here, or means another machine on every node.
        """
        if not self.address or not self.port:
            raise LaunchError(
                f"WORLD_SIZE={self.world}, but MASTER_ADDR or MASTER_PORT is not set; start it with accelerate launch "
                "or torchrun, or set both in each process to where rank 0 runs"
            )
        if self.several_nodes and self.address in _LOCAL:
            raise LaunchError(
                f"MASTER_ADDR={self.address} is every machine's own, and there are several; set it to the name of rank "
                '0\'s machine: MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        resolve(self.address, self.place.node)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} is no number; mend what starts the processes") from None


def resolve(address: str, node: str) -> str:
    """The first numeric address behind a name.

    Raises:
        LaunchError: there is none, or no name server answers in time.
    """
    found: list[str | OSError] = []

    def ask() -> None:
        try:
            found.append(str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # it cannot be interrupted
    thread.start()
    thread.join(_RESOLVE_SECONDS)
    answer = found[0] if found else f"no answer in {_RESOLVE_SECONDS:.0f} s"
    if isinstance(answer, OSError) or not found:
        why = answer.strerror if isinstance(answer, OSError) else answer
        raise LaunchError(
            f"MASTER_ADDR={address} does not resolve on {node} ({why}); set it to a name or address of rank 0's "
            'machine that every node knows, such as $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    return answer


def reach(address: str, port: int, node: str, deadline: float) -> socket.socket:
    """A connection to rank 0, which may not have come yet.

    Args:
        deadline: of `time.monotonic`.

    Raises:
        LaunchError: there is none in time.
    """
    started, why = time.monotonic(), "nobody tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((address, port), timeout=min(_CONNECT_SECONDS, left))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.1, max(left, 0)))
        else:
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # with itself: a free port may be drawn as our own
    raise LaunchError(
        f"rank 0 at MASTER_ADDR={address}, port {port}, cannot be reached from {node} in "
        f"{time.monotonic() - started:.0f} s ({why}); see whether rank 0 runs there and says anything, and whether a "
        f"firewall lies between; the interfaces of {node} are {interfaces()}"
    )


def interfaces() -> str:
    """Those of this machine that are up, with their speeds: what NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose."""
    addresses = psutil.net_if_addrs()
    shown = []
    for name, facts in psutil.net_if_stats().items():
        v4 = [entry.address for entry in addresses.get(name, []) if entry.family == socket.AF_INET]
        if facts.isup and v4:
            speed = f", {facts.speed / 1000:g} Gb/s" if facts.speed else ""
            shown.append(f"{name} ({v4[0]}{speed})")
    return ", ".join(shown) or "none"
