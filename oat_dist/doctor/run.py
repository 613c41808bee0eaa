"""The walk over all checks.

1. Each process looks at itself, and all meet by plain sockets (`wire`): now it is known who is missing or in trouble.
2. Only if nobody is, the engine starts, as the training would start it.
3. Checks that need all ranks: each rank looks, all exchange what they saw, rank 0 judges. The practice training comes
   last, because it alone may break off in the middle of a collective.
4. Rank 0 alone asks the scheduler for a signal, prints, and tells the others how to end.

Where the processes do not come together, rank 0 does what it can alone, and says what it could not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch

from oat_dist.config import Config
from oat_dist.distributed import World
from oat_dist.doctor import devices, signals
from oat_dist.doctor.launch import Launch, interfaces
from oat_dist.doctor.looks import Trouble, attempt, ranks_text
from oat_dist.doctor.rows import FAIL, Row
from oat_dist.doctor.walk import LAST_SECONDS, Options, Walk
from oat_dist.doctor.wire import Meeting, meet
from oat_dist.engine.launcher import Plan, agree
from oat_dist.errors import ConfigError, OatError
from oat_dist.parts import engine_for
from oat_dist.stopping import sigterm_unwinds

__all__ = ["Options", "examine"]

_START_SECONDS = 180.0
_GRACE_SECONDS = 20.0  # in which rank 0 can say what is wrong, before a launcher ends it because another has ended


def examine(config: Config, options: Options, report: Callable[[list[Row], int], None]) -> int:
    """Do all checks; every process calls it, in its main thread.

    Args:
        report: called once, on rank 0, with the rows and the number of processes.

    Returns:
        The exit status, the same on all ranks: 1 when a check failed.

    Raises:
        ConfigError: launcher and configuration ask for what cannot be, before anything is looked at.
    """
    heard = attempt(signals.look, config)  # first: nobody has changed what a signal does
    with sigterm_unwinds():
        return _examine(Walk(config, options, report, heard))


def _examine(walk: Walk) -> int:
    config, options = walk.config, walk.options
    launch = attempt(Launch.read)
    if isinstance(launch, Trouble):
        if os.environ.get("RANK", "0") != "0":
            return _silent(launch)
        walk.stand_alone("processes", launch)
        return walk.end()
    walk.world = World(rank=launch.place.rank)
    plan = _agreed(config)
    in_use = plan if isinstance(plan, Trouble) else attempt(devices.gpu_in_use, plan, launch.place.local_rank)
    trouble = in_use if isinstance(in_use, Trouble) else None  # it would not start, and the others would wait for it
    walk.gpu_in_use = 0.0 if isinstance(in_use, Trouble) else in_use
    meeting = attempt(meet, launch, trouble, options.wait)
    if isinstance(meeting, Trouble) or not meeting.go:
        return _do_not_meet(walk, launch, meeting)
    walk.wire = meeting.wire
    meeting.wire.guard(walk.broken_off)
    with meeting.wire.phase("starting the engine", _START_SECONDS + options.wait):
        engine = attempt(engine_for, config)
    if isinstance(engine, Trouble):
        return _did_not_start(walk, launch, meeting, engine)
    walk.engine, walk.world = engine, engine.world
    with walk.workspace():
        walk.together(launch)
        status = walk.end()
    if walk.broken:
        _leave(status)
    engine.close()
    return status


def _leave(status: int) -> NoReturn:
    """At once: what is left of a process group that is no whole one may wait for the others for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _agreed(config: Config) -> Plan | Trouble:
    try:
        return agree(config.engine.name, config.engine.deepspeed, config.engine.precision)
    except ConfigError:
        raise
    except OatError as error:
        return Trouble.of(error)


def _do_not_meet(walk: Walk, launch: Launch, meeting: Meeting | Trouble) -> int:
    if launch.place.rank:
        known = meeting if isinstance(meeting, Trouble) else next(iter(meeting.troubles.values()), None)
        if known is not None:
            _say(f"[{ranks_text([launch.place])}] fail: {known.found}; {known.remedy}")
        if not isinstance(meeting, Trouble):
            meeting.wire.ask("exit", LAST_SECONDS)
            return 1
        time.sleep(_GRACE_SECONDS)
        return 1
    if not launch.speaks:  # several processes that all take themselves for rank 0
        return _silent(meeting if isinstance(meeting, Trouble) else next(iter(meeting.troubles.values())))
    if isinstance(meeting, Trouble):
        walk.stand_alone("processes", meeting)
        return walk.end()
    walk.wire, walk.places = meeting.wire, [launch.place]
    for row in _meeting_rows(launch, meeting):
        walk.add(row)
    walk.stand_alone("processes", None)
    return walk.end()


def _meeting_rows(launch: Launch, meeting: Meeting) -> list[Row]:
    rows = []
    if meeting.missing:
        came = f"{len(meeting.came)} of {launch.world} processes have met: {ranks_text(meeting.came)}"
        missing = ", ".join(map(str, meeting.missing[:20])) + ("" if len(meeting.missing) <= 20 else ", ...")
        rows.append(
            Row(
                "processes",
                FAIL,
                f"{came}; missing: rank {missing}",
                f"see what those say; each must reach {launch.address}, port {launch.port} (MASTER_ADDR, MASTER_PORT); "
                "--wait SECONDS if they start late",
            )
        )
    known = {place.rank: place for place in meeting.came}
    groups: dict[Trouble, list[int]] = {}
    for rank, trouble in meeting.troubles.items():
        groups.setdefault(trouble, []).append(rank)
    for trouble, ranks in groups.items():
        places = [known[rank] for rank in ranks if rank in known]
        where = f" [on {ranks_text(places)}]" if places and len(places) < launch.world else ""
        rows.append(Row("processes", FAIL, f"{trouble.found}{where}", trouble.remedy))
    return rows


def _did_not_start(walk: Walk, launch: Launch, meeting: Meeting, trouble: Trouble) -> int:
    """All have met, and yet torch, Accelerate or DeepSpeed did not bring them together."""
    wire = meeting.wire
    wire.stand_down()
    foreign = not trouble.remedy  # no error of ours, which all ranks have alike
    if foreign:
        name = "NCCL_SOCKET_IFNAME (and see NCCL_DEBUG=INFO)" if torch.cuda.is_available() else "GLOO_SOCKET_IFNAME"
        trouble = Trouble(
            trouble.found, f"set {name} to the interface that the machines share; here are {interfaces()}"
        )
    if launch.place.rank:
        wire.tell("trouble", [trouble.found, trouble.remedy])
        wire.ask("exit", LAST_SECONDS)
        return _leave(1) if foreign else 1
    if not launch.speaks:
        return _silent(trouble)
    walk.add(Row("processes", FAIL, trouble.found, trouble.remedy))
    walk.places = meeting.came
    walk.blame("starting the engine", wire.others(2.0) if launch.world > 1 else {})
    walk.places = [launch.place]
    walk.stand_alone("processes", None)
    status = walk.end()
    return _leave(status) if foreign and launch.world > 1 else status


def _silent(trouble: Trouble) -> int:
    """One process says it for all; its launcher may end it as soon as another one ends."""
    time.sleep(_GRACE_SECONDS)
    _say(f"fail: {trouble.found}; {trouble.remedy}")
    return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
