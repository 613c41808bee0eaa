"""The checks of one process, one after the other, and the rows that rank 0 collects."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from oat_dist.config import Config
from oat_dist.data.remote.shard_cache import default_cache_dir
from oat_dist.distributed import World
from oat_dist.doctor import devices, network, practice, shards, signals, slurm, storage, versions
from oat_dist.doctor.launch import Launch, interfaces
from oat_dist.doctor.looks import Place, Trouble, attempt, node_name, ranks_text, trouble_rows
from oat_dist.doctor.rows import FAIL, SKIP, Row
from oat_dist.doctor.wire import Wire
from oat_dist.engine import Engine
from oat_dist.engine.launcher import is_true
from oat_dist.errors import OatError

__all__ = ["LAST_SECONDS", "Options", "Walk"]

LAST_SECONDS = 300.0  # rank 0 may take so long to finish after the last exchange
_NETWORK_SECONDS = 180.0
_LONG_SECONDS = 3600.0  # for what takes as long as it takes; trouble breaks it off, not time


@dataclass(frozen=True)
class Options:
    """`quick`: no checksums; `training`: practise; `grace`: seconds from signal to end, None: find out; `wait`: for the
    other processes, in seconds."""

    quick: bool = False
    training: bool = True
    grace: float | None = None
    wait: float = 120.0


class Walk:
    """The checks of one process, and the rows that rank 0 collects.

    Args:
        report: called with rows and number of processes.
        heard: what `signals.look` saw.

    Attributes:
        broken: whether collectives can no longer be trusted.
    """

    def __init__(
        self,
        config: Config,
        options: Options,
        report: Callable[[list[Row], int], None],
        heard: signals.Heard | Trouble,
    ) -> None:
        self.config, self.options, self.report, self.heard = config, options, report, heard
        self.engine: Engine | None = None
        self.world = World()
        self.wire = Wire({})
        self.places = [Place(0, 0, node_name(), node_name())]
        self.rows: list[Row] = []
        self.broken = False
        self.gpu_in_use = 0.0  # GiB, before the engine has started
        self.job: dict[str, str] | Trouble | None = None
        self.opened: shards.Opened | Trouble = Trouble("not opened")
        self.space: storage.Workspace | Trouble | None = None
        self.checkpoint: int | None = None

    # What all ranks do together.

    def together(self, launch: Launch) -> None:
        """Every check, on all ranks; ends early when the ranks lose each other."""
        assert self.engine is not None
        steps: list[tuple[str, float, Callable[[], None]]] = [
            ("the first exchange", _NETWORK_SECONDS, lambda: self._processes(launch)),
            ("comparing versions", _NETWORK_SECONDS, self._versions),
            ("comparing devices", _NETWORK_SECONDS, self._devices),
            ("the timed all-reduce", _NETWORK_SECONDS, self._speed),
            ("looking at output_dir", _LONG_SECONDS, self._output),
            ("looking at the data", 24 * _LONG_SECONDS, self._data),
            ("comparing signals", _NETWORK_SECONDS, self._signals),
            ("asking the scheduler", _NETWORK_SECONDS, self._slurm),
            ("the practice training", _LONG_SECONDS, self._practice),
            ("measuring free space", _NETWORK_SECONDS, self._room),
        ]
        for name, seconds, step in steps:
            if self.broken:
                break
            self._exchange(name, seconds, step)
        if self.broken and self.world.is_main:
            self.world = World()  # what is left is asked of this node alone
            self._room()

    def _exchange(self, name: str, seconds: float, step: Callable[[], None]) -> None:
        """One check. Looks do not fail, so what fails here is the exchange itself, or we."""
        try:
            with self.wire.phase(name, seconds):
                step()
        except Exception as error:
            self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self.broken = True
        self.wire.stand_down()
        trouble = (
            practice.out_of_memory(self.config) if isinstance(error, torch.OutOfMemoryError) else Trouble.of(error)
        )
        if not isinstance(error, (OatError, RuntimeError, OSError)):
            traceback.print_exc()  # a defect of ours
        if not self.world.is_main:
            self.wire.tell("trouble", [trouble.found, trouble.remedy])
            return
        # Gloo tells rank 0 that another one is gone; that one, if it still can, tells why.
        gone = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        others = self.wire.others(3.0 if gone else 0.5)
        if not (gone and others):
            self.add(Row(_check_of(name), FAIL, trouble.found, trouble.remedy or f"it happened in {name}"))
        self.blame(name, others)

    def blame(self, name: str, others: dict[int, Trouble]) -> None:
        """Add what other ranks have to say of a failure, by rank, unless it is said already."""
        groups: dict[Trouble, list[Place]] = {}
        for rank, trouble in others.items():
            groups.setdefault(trouble, []).append(self.places[rank])
        for trouble, places in groups.items():
            row = Row(_check_of(name), FAIL, f"{trouble.found} [{ranks_text(places)}, in {name}]", trouble.remedy)
            if not any(trouble.found in other.found for other in self.rows):
                self.add(row)

    def broken_off(self, phase: str) -> NoReturn:
        """In a thread: this rank waits for what will not come. Says what is known, and ends the process."""
        if self.world.is_main:
            others = self.wire.others(0.0)
            self.blame(phase, others)
            if not others:
                self.add(
                    Row(
                        _check_of(phase),
                        FAIL,
                        f"the ranks did not come back from {phase} in time",
                        "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the interface that the machines share; here "
                        f"are {interfaces()}",
                    )
                )
            self.add(Row("other checks", SKIP, "not done after that"))
            self.report(self.rows, len(self.places))
            self.wire.tell("exit", 1)
            if isinstance(self.space, storage.Workspace):
                self.space.remove()
        sys.stdout.flush()
        os._exit(1)  # the main thread cannot be woken

    def add(self, row: Row) -> None:
        if self.world.is_main:
            self.rows.append(row)

    def _add(self, judge: Callable[[], Sequence[Row] | Row]) -> None:
        """On rank 0."""
        if self.world.is_main:
            rows = judge()
            self.rows += [rows] if isinstance(rows, Row) else rows

    def _processes(self, launch: Launch) -> None:
        self.places = self.world.gather_objects(launch.place)
        loopback = self.world.gather_objects(network.loopback_name())
        self._add(lambda: network.judge_processes(launch, self.places, loopback))

    def _versions(self) -> None:
        assert self.engine is not None
        found = self.world.gather_objects(attempt(versions.look))
        needed = self.engine.plan.stage > 0
        self._add(lambda: versions.judge(found, self.places, needed))

    def _devices(self) -> None:
        precision = self.config.engine.precision if self.engine is None else self.engine.precision
        found = self.world.gather_objects(attempt(devices.look, self.world.device, self.gpu_in_use))
        self._add(lambda: devices.judge(found, self.places, precision, self.config.data.workers))

    def _speed(self) -> None:
        speed = network.measure(self.world) if self.world.size > 1 else network.Speed(0.0, 1, 1.0)
        self._add(lambda: network.judge_speed(speed, self.places, self.world.device.type))

    def _output(self) -> None:
        folder = Path(self.config.output_dir)
        if self.world.is_main:
            self.space = attempt(storage.Workspace.make, folder)  # to be removed, come what may
        mine = self.space.token if isinstance(self.space, storage.Workspace) else self.space
        token = self.world.gather_objects(mine)[0]
        if isinstance(token, Trouble):
            self.space = token
            self._add(lambda: trouble_rows("output_dir", [token], self.places[:1]))
            return
        space = self.space if isinstance(self.space, storage.Workspace) else storage.Workspace(folder, token)
        self.space = space
        rows = storage.check_sharing(space, self.config, self.world, self.places)
        self._add(lambda: rows)
        shared = not any(row.status == FAIL and row.check == "output_dir" for row in rows)
        if not self.world.gather_objects(shared)[0]:
            self._give_up_space()

    def _give_up_space(self) -> None:
        if self.world.is_main and isinstance(self.space, storage.Workspace):
            self.space.remove()
        self.space = Trouble("output_dir cannot be used")

    def _data(self) -> None:
        self.opened = opened = attempt(shards.open_sets, self.config)
        found = self.world.gather_objects(opened if isinstance(opened, Trouble) else opened.digests)
        self._add(lambda: shards.judge_sets(found, self.places, opened))
        if isinstance(opened, Trouble) or any(one != found[0] for one in found):
            if not isinstance(opened, Trouble):
                self.opened = Trouble("not the same on all ranks")
            self.add(Row("shards", SKIP, "not read, since the data are not right on all ranks"))
            return
        self.checkpoint = self._estimated(opened)
        rows = shards.check_bytes(opened, self.world, self.places, quick=self.options.quick, shown=self.world.is_main)
        self._add(lambda: rows)

    def _estimated(self, opened: shards.Opened) -> int | None:
        size = attempt(practice.checkpoint_bytes, self.config, len(opened.train.classes))
        return None if isinstance(size, Trouble) else size

    def _signals(self) -> None:
        found = self.world.gather_objects(self.heard)
        self._add(lambda: signals.judge(found, self.places, self.config))

    def _slurm(self) -> None:
        self.job = attempt(slurm.job_facts) if self.world.is_main else None
        gpus = self.world.gather_objects(slurm.gpus_here())
        self._add(lambda: slurm.judge(self.job, self.places, gpus, self.world.device.type))

    def _practice(self) -> None:
        why = self._unfit()
        if self.world.gather_objects(why)[0]:
            self.add(Row("practice", SKIP, f"{why}"))
            return
        assert self.engine is not None and isinstance(self.space, storage.Workspace)
        assert isinstance(self.opened, shards.Opened)
        if self.world.is_main:
            print(f"practice: {practice.STEPS} steps and a checkpoint ...", file=sys.stderr, flush=True)
        config = practice.practice_config(self.config, self.space.folder / "run", self.opened)
        try:
            trial = practice.practise(config, self.engine)
        except OatError as error:
            if not error.everywhere:
                raise
            trouble = Trouble.of(error)
            self._add(lambda: trouble_rows("practice", [trouble], self.places[:1]))
            return
        trials = self.world.gather_objects(trial)
        self.checkpoint = trial.size
        name = self.engine.name
        self._add(lambda: [practice.judge_trial(trials, name), self._grace_row(trials)])

    def _grace_row(self, trials: Sequence[practice.Trial]) -> Row:
        found = attempt(slurm.grace_period, self.options.grace, self.job)
        if isinstance(found, Trouble):
            return Row("grace period", FAIL, found.found, found.remedy)
        return practice.judge_grace(trials, self.config.job.check_seconds, *found)

    def _unfit(self) -> str:
        """Why rank 0 would not practise; the others do as it does."""
        if not self.options.training:
            return "--no-training"
        if not isinstance(self.space, storage.Workspace):
            return "there is no output_dir to save to"
        if isinstance(self.opened, Trouble):
            return "there is no data to train on"
        return ""

    def _room(self) -> None:
        space, opened = self.space, self.opened
        remote = 0 if isinstance(opened, Trouble) else opened.remote_bytes
        cache = default_cache_dir(self.config.data.cache_dir) if remote else None
        limit = self.config.data.cache_gb
        needed = remote if limit is None else min(remote, int(limit * 1e9))
        there = space.folder if isinstance(space, storage.Workspace) else _nearest(Path(self.config.output_dir))
        found = self.world.gather_objects(attempt(storage.room, there, cache, needed))
        saved = attempt(storage.saved_bytes, Path(self.config.output_dir))
        self._add(
            lambda: storage.judge_room(
                found,
                self.places[: len(found)],
                self.checkpoint,
                self.config,
                0 if isinstance(saved, Trouble) else saved,
            )
        )

    # What rank 0 does by itself.

    def stand_alone(self, check: str, trouble: Trouble | None) -> None:
        """The processes did not come together: do what this one can do without the others."""
        self.world = World()
        if trouble is not None:
            self.add(Row(check, FAIL, trouble.found, trouble.remedy))
        with self.workspace():
            self.options = Options(True, False, self.options.grace, self.options.wait)
            looks = [self._alone_versions, self._alone_devices]
            for step in [*looks, self._output, self._data, self._signals, self._slurm, self._room]:
                self._exchange("checks of rank 0 alone", _LONG_SECONDS, step)
        self.add(Row("all-reduce", SKIP, "the processes do not see each other"))
        self.add(Row("practice", SKIP, "the processes do not see each other"))

    def _alone_versions(self) -> None:
        found = [attempt(versions.look)]
        self._add(lambda: versions.judge(found, self.places, (self.config.engine.name or "ddp") != "ddp"))

    def _alone_devices(self) -> None:
        gpu = torch.cuda.is_available() and not is_true("ACCELERATE_USE_CPU")
        device = torch.device("cuda", self.places[0].local_rank) if gpu else torch.device("cpu")
        found = [attempt(devices.look, device, self.gpu_in_use)]
        self._add(lambda: devices.judge(found, self.places, self.config.engine.precision, self.config.data.workers))

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """Whatever happens in the block, nothing of ours is left in output_dir."""
        try:
            yield
        finally:
            if self.world.is_main and isinstance(self.space, storage.Workspace):
                self.space.remove()

    def end(self) -> int:
        """Rank 0 finishes and prints, the others wait for its word; the exit status."""
        if not self.world.is_main:
            status: Any = self.wire.ask("exit", LAST_SECONDS)
            self.wire.stand_down()
            return int(status) if isinstance(status, int) else 1
        self.wire.stand_down()
        if isinstance(self.space, storage.Workspace):
            self.space.remove()  # now: a signal to the batch script may end us
        if self.job is None:  # the walk may have ended before
            self.job = attempt(slurm.job_facts)
        self.add(signals.check_delivery(self.config, self.job))
        self.report(self.rows, len(self.places))
        status = int(any(row.status == FAIL for row in self.rows))
        self.wire.tell("exit", status)
        return status


def _check_of(phase: str) -> str:
    return "practice" if "practice" in phase else "processes"


def _nearest(folder: Path) -> Path:
    return next(path for path in [folder, *folder.absolute().parents] if path.is_dir())
