"""A real Slurm on this machine: munge, slurmctld and one slurmd a node, in a temporary folder, on ports of their own.

What Slurm is asked for here is what a user asks for: sbatch, scancel, scontrol. Nodes are loopback addresses, so that
the names Slurm gives to a job resolve. Needs root, since Slurm starts jobs as their user; no systemd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["MiniCluster", "missing", "tracking"]

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_FIRST_PORT = 17000

# preempt_send_user_signal: a preempted job gets its --signal first, as on a cluster that means well.
# cred_expire: a job that is requeued waits for its old credential to run out (else two minutes).
_SLURM_CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=1
KillWait=30
SlurmdTimeout=10
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={network}.[11-{last}] NodeHostname={host} Port={first_port}-{last_port} CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# GPUs that are only counted: Slurm deals them out without opening them.
_GRES_CONF = "AutoDetect=off\nName=gpu File={folder}/run/gpu[0-1]\n"
_CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


def missing() -> str | None:
    """Why there can be no cluster on this machine; None where there can be one."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    return None


def tracking() -> str:
    """How Slurm can keep track of processes here: as clusters do, or by who is whose child."""
    return "cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"


class MiniCluster:
    """A running cluster of `nodes` nodes with 4 (claimed) cores each: ``with MiniCluster() as cluster``.

    Its partition ``high`` preempts ``debug``, the default one. `environment` is what Slurm's commands need.
    """

    def __init__(self, nodes: int = 2) -> None:
        self._ports = _free_ports(nodes + 1)
        # Another network for every cluster at a time: Slurm names the control groups of processes by node and job.
        self._network = f"127.0.{(self._ports[0] - _FIRST_PORT) % 250}"
        self.nodes = [f"{self._network}.{11 + number}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="oat-slurm-"))
        self.environment = {
            # not what an outer job, or a user's default partition, would say
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._closing = threading.Event()
        # Clears away at the end of its input, so also when this process is killed.
        self._undertaker = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), *self.nodes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> MiniCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What a user does.

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """sbatch; the job's id."""
        return self._run("sbatch", "--parsable", *options, str(script), *arguments, **environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says; a task of an array is ``<id>_<number>``."""
        return dict(word.partition("=")[::2] for word in self._run("scontrol", "-o", "show", "job", job).split())

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait_state(self, job: str, *states: str) -> str:
        """Wait until the job is in one of `states`, and return it."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [self.state(job)]
            return found[0] in states

        self.until(there, f"job {job} is {' or '.join(states)}", pause=0.3)
        return found[0]

    def until(self, condition: Callable[[], object], what: str, *, seconds: float = 300, pause: float = 0.1) -> None:
        """Wait for `condition`. The deadline is for a test that would hang; nothing is concluded from it."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:g} s still not: {what}")
            if self._closing.wait(pause):
                raise AssertionError(f"the cluster was stopped before: {what}")

    def cancel(self, job: str) -> None:
        self._run("scancel", job)

    def signal(self, job: str, name: str = "USR1") -> None:
        """Send a signal to the job's batch script alone, as Slurm does before a time limit."""
        self._run("scancel", "--batch", f"--signal={name}", job)

    def seconds_run(self, job: str) -> int:
        """Since its attempt has started."""
        hours, minutes, seconds = map(int, self.show(job)["RunTime"].split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def time_limit(self, job: str, minutes: int) -> None:
        self._run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")

    def node_down(self, node: str) -> None:
        self._run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def node_up(self, node: str) -> None:
        self._run("scontrol", "update", f"nodename={node}", "state=resume")

    def logs(self) -> str:
        """The end of what the daemons have logged."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-30:]) for path in files)

    def ranks(self, job: str) -> dict[int, int]:
        """The processes of a job's ranks: rank -> process id. Of an array's task, `job` is its own number."""
        found = {}
        for pid in processes(self.folder):
            with contextlib.suppress(OSError):
                environment = dict(
                    word.partition("=")[::2] for word in Path(f"/proc/{pid}/environ").read_text().split("\0")
                )
                if environment.get("SLURM_JOB_ID") == job and "RANK" in environment:
                    found[int(environment["RANK"])] = pid
        return found

    # Up and down.

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("run", "log", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
        for number in range(2):
            (self.folder / "run" / f"gpu{number}").touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run, log = self.folder / "run", self.folder / "log"
        values = {
            "folder": self.folder,
            "host": socket.gethostname(),
            "tracking": tracking(),
            "network": self._network,
            "port": self._ports[0],
            "first_port": self._ports[1],
            "last_port": self._ports[-1],
            "last": 10 + len(self.nodes),
        }
        for name, text in (("slurm", _SLURM_CONF), ("gres", _GRES_CONF), ("cgroup", _CGROUP_CONF)):
            (self.folder / f"{name}.conf").write_text(text.format(**values))
        files = [f"--{name}={path}" for name, path in (
            ("key-file", key), ("socket", run / "munge.socket"), ("pid-file", run / "munged.pid"),
            ("log-file", log / "munged.log"), ("seed-file", run / "munged.seed"),
        )]  # fmt: skip
        self._run("munged", *files)
        self._run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self._run("slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        try:
            self.until(self._idle, f"{len(self.nodes)} idle nodes", seconds=60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def _idle(self) -> bool:
        with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
            states = self._run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split()
            return states == ["idle"] * len(self.nodes)
        return False

    def stop(self) -> None:
        """End everything, in the order that lets Slurm clean up after itself, then whatever is left."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self._run("scancel", "--full", "--signal=KILL", "--user=root")
            self._run("scancel", "--user=root")
            _gone(lambda: self._run("squeue", "-h").split(), seconds=15)
        left, _ = self._undertaker.communicate()
        if left:
            raise AssertionError(f"the cluster has left behind: {left}")

    def _run(self, program: str, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [program, *arguments],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: status {done.returncode}\n{done.stderr}")
        return done.stdout


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps daemons


def _free_ports(count: int) -> list[int]:
    """A row of ports that nobody listens on."""
    for first in range(_FIRST_PORT, 30000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("0.0.0.0", port))
            return list(range(first, first + count))
    raise AssertionError("no row of free ports")


def processes(folder: Path) -> dict[int, str]:
    """Every process on this machine that belongs to the cluster in `folder`: its daemons and all they have started."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _clear_away(folder: Path, nodes: list[str]) -> list[object]:
    """End and remove what there is of a cluster; what would not go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if _gone(lambda: processes(folder), seconds=10):
            break
    left: list[object] = list(processes(folder).items())
    for group in (_FREEZER / f"slurm_{node}" for node in nodes):
        for path, _, _ in os.walk(group, topdown=False):  # Slurm leaves them behind, empty
            with contextlib.suppress(OSError):
                Path(path).rmdir()
        left += [group] if group.exists() else []
    left += [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    shutil.rmtree(folder)
    return left


def _gone(left: Callable[[], object], seconds: float) -> bool:
    """Wait until there is nothing left."""
    deadline = time.monotonic() + seconds
    while left():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    sys.stdin.read()
    print(*_clear_away(Path(sys.argv[1]), sys.argv[2:]), end="")
