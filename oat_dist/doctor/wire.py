"""A plain connection of every rank to rank 0, beside the collectives.

Collectives cannot tell that one rank is missing, has failed, or has died: the others wait. So before the engine starts,
all ranks meet at MASTER_ADDR:MASTER_PORT (under an elastic agent, which has that port, at another one that the agent's
store tells). Rank 0 says whether all have come and none has a problem. The connections stay: a rank whose check breaks
off in the middle of a collective says so here, and one that dies is noticed at once. If then rank 0 sits in a
collective that cannot end, a thread prints what is known and ends the process; when rank 0 is gone, so are the others.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from oat_dist.doctor.launch import Launch, interfaces, reach
from oat_dist.doctor.looks import Place, Trouble, ranks_text
from oat_dist.errors import LaunchError

__all__ = ["Meeting", "Wire", "meet"]

_HELLO = "oat-dist doctor"
_HELLO_SECONDS = 5.0
_STUCK_SECONDS = 10.0  # after another rank's trouble: then what we wait for will not come
_LONGEST_LINE = 1 << 16


class Wire:
    """This rank's connections: rank 0's to all others, theirs to rank 0. Used from several threads.

    Args:
        peers: by rank.

    Attributes:
        troubles: what other ranks have said to have, by rank.
        gone: when a connection ended, by rank.
    """

    def __init__(self, peers: Mapping[int, socket.socket]) -> None:
        self.troubles: dict[int, Trouble] = {}
        self.gone: dict[int, float] = {}
        self._peers = dict(peers)
        self._words: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._stand_down = threading.Event()
        self._lost: Callable[[str], None] = lambda phase: None
        self._phase, self._deadline = "starting", float("inf")
        self._troubled_at: float | None = None
        for peer in self._peers.values():
            peer.settimeout(None)
        if self._peers:
            threading.Thread(target=self._listen, name="oat-wire", daemon=True).start()

    def tell(self, word: str, value: Any = None) -> None:
        """Say something to whoever listens at the other end(s). Who has gone does not hear it."""
        line = (json.dumps({"word": word, "value": value}) + "\n").encode()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(line)

    def ask(self, word: str, seconds: float) -> Any:
        """What rank 0 says under this word; None when it is gone, or says nothing in time."""
        with self._changed:
            self._changed.wait_for(lambda: word in self._words or self.gone, seconds)
            return self._words.get(word)

    def others(self, seconds: float) -> dict[int, Trouble]:
        """What the other ranks have to say of a failure, or that they are gone; waits for the first one."""
        with self._changed:
            self._changed.wait_for(lambda: self.troubles or self.gone, seconds)
            found = dict(self.troubles)
        for rank in self.gone:
            found.setdefault(
                rank, Trouble("has ended without a word", "see its own output; was it killed for want of memory?")
            )
        return found

    def guard(self, lost: Callable[[str], None]) -> None:
        """Call `lost(phase)`, in a thread, should this rank wait for what cannot come."""
        self._lost = lost

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """Expect the block, full of collectives, to end in so many seconds."""
        patience = 30 if 0 in self._peers else 0  # rank 0 first: it can say why
        self._phase, self._deadline = name, time.monotonic() + seconds + patience
        try:
            yield
        finally:
            self._deadline = float("inf")

    def stand_down(self) -> None:
        """No collective is waited for any more."""
        self._stand_down.set()

    def close(self) -> None:
        self.stand_down()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        buffers = dict.fromkeys(self._peers, b"")
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map() or not self._stand_down.is_set():
                for key, _ in selector.select(0.5) if selector.get_map() else ():
                    data = _receive(self._peers[key.data])
                    buffers[key.data] += data
                    if not data or len(buffers[key.data]) > _LONGEST_LINE:
                        selector.unregister(key.fileobj)
                        with self._changed:
                            self.gone[key.data] = time.monotonic()
                            self._changed.notify_all()
                    *lines, buffers[key.data] = buffers[key.data].split(b"\n")
                    for line in lines:
                        self._heard(key.data, line)
                if not selector.get_map():
                    time.sleep(0.5)
                self._look_after()

    def _heard(self, rank: int, line: bytes) -> None:
        said = json.loads(line)
        with self._changed:
            if said["word"] == "trouble":
                self.troubles[rank] = Trouble(*said["value"])
            else:
                self._words[said["word"]] = said["value"]
            self._changed.notify_all()

    def _look_after(self) -> None:
        """In the thread: end this process where its main thread waits in vain."""
        now = time.monotonic()
        if self.troubles or self.gone:
            self._troubled_at = self._troubled_at or now
        stuck = self._troubled_at is not None and now - self._troubled_at > _STUCK_SECONDS
        if (stuck or now > self._deadline) and not self._stand_down.is_set():
            self._stand_down.set()
            self._lost(self._phase)


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(4096)
    except OSError:
        return b""


@dataclass(frozen=True)
class Meeting:
    """Who has come, as far as this rank knows; rank 0 knows all. `go`: whether the engine may be started."""

    wire: Wire
    go: bool
    came: list[Place]
    missing: list[int]
    troubles: dict[int, Trouble]


def meet(launch: Launch, trouble: Trouble | None, seconds: float) -> Meeting:
    """Every rank calls it, with the trouble it has, and waits so long for the others.

    Raises:
        LaunchError: rank 0's address makes no sense, rank 0 cannot be reached, or cannot listen.
    """
    troubles = {} if trouble is None else {launch.place.rank: trouble}
    if launch.world == 1:
        return Meeting(Wire({}), not troubles, [launch.place], [], troubles)
    launch.check_address()
    deadline = time.monotonic() + seconds
    if launch.place.rank:
        return _join(launch, trouble, deadline)
    with _listening(launch) as listener:
        peers, came = {}, {0: launch.place}
        while len(came) < launch.world and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                break
            hello = _hello(peer)
            if hello is None:
                peer.close()
                continue
            place, world, its_trouble = hello
            if place.rank in came or not 0 < place.rank < launch.world or world != launch.world:
                troubles[place.rank] = Trouble(
                    f"{ranks_text([place])} of {world} has come to port {launch.port}, where {launch.world} ranks are "
                    "awaited, each once",
                    "set RANK and WORLD_SIZE right in each process, or another MASTER_PORT if this is another job's",
                )
                peer.close()
                continue
            peers[place.rank], came[place.rank] = peer, place
            if its_trouble is not None:
                troubles[place.rank] = its_trouble
    # Nobody listens at the port any more: only now may anybody start the engine, which uses it.
    missing = [rank for rank in range(launch.world) if rank not in came]
    wire, go = Wire(peers), not missing and not troubles
    wire.tell("go", go)
    return Meeting(wire, go, [came[rank] for rank in sorted(came)], missing, troubles)


def _join(launch: Launch, trouble: Trouble | None, deadline: float) -> Meeting:
    port = _told_port(launch, deadline) if launch.agent_store else launch.port
    peer = reach(launch.address, port, launch.place.node, deadline)
    said = None if trouble is None else [trouble.found, trouble.remedy]
    hello = {"hello": _HELLO, "place": asdict(launch.place), "world": launch.world, "trouble": said}
    peer.sendall((json.dumps(hello) + "\n").encode())
    wire = Wire({0: peer})
    go = wire.ask("go", max(deadline - time.monotonic(), 0) + 30)
    troubles = {} if trouble is None else {launch.place.rank: trouble}
    if go is None:
        raise LaunchError(
            f"rank 0 at {launch.address} has taken no notice of {ranks_text([launch.place])}; see its output"
        )
    return Meeting(wire, bool(go), [launch.place], [], troubles)


@contextmanager
def _listening(launch: Launch) -> Iterator[socket.socket]:
    """A listening socket of rank 0.

    Raises:
        LaunchError: the port is taken, or MASTER_ADDR is another machine.
    """
    port = 0 if launch.agent_store else launch.port
    try:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        else:
            listener = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise LaunchError(
            f"port {port} (MASTER_PORT) cannot be opened on {launch.place.node} ({error.strerror}); choose another, "
            "such as $((20000 + SLURM_JOB_ID % 10000)): two jobs on one node need two"
        ) from error
    with listener:
        taken = int(listener.getsockname()[1])
        # Through the address that the others use: it may be another machine's.
        reach(launch.address, taken, f"rank 0's own node {launch.place.node}", time.monotonic() + 5).close()
        if launch.agent_store:
            _agent_store(launch).set(_key(), str(taken))
        yield listener


def _hello(peer: socket.socket) -> tuple[Place, int, Trouble | None] | None:
    """Who it is, of how many, with which trouble; None: it is not one of us."""
    peer.settimeout(_HELLO_SECONDS)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            data = peer.recv(4096)
            if not data:
                return None
            line += data
        said = json.loads(line)
        trouble = None if said["trouble"] is None else Trouble(*said["trouble"])
        return (Place(**said["place"]), int(said["world"]), trouble) if said["hello"] == _HELLO else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _agent_store(launch: Launch) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(launch.address, launch.port, is_master=False)


def _key() -> str:
    return f"oat-dist-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _told_port(launch: Launch, deadline: float) -> int:
    reach(launch.address, launch.port, launch.place.node, deadline).close()
    store = _agent_store(launch)
    while time.monotonic() < deadline:
        if store.check([_key()]):
            return int(store.get(_key()))
        time.sleep(0.1)
    raise LaunchError(
        f"rank 0 has not come to {launch.address} in time; see its output; the interfaces of {launch.place.node} are "
        f"{interfaces()}"
    )
