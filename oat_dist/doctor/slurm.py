"""What Slurm says of this job: whether it comes back after preemption, how long it has, how many GPUs it holds."""

from __future__ import annotations

import datetime
import math
import os
import re
import subprocess
from collections.abc import Sequence

from oat_dist.doctor.looks import Place, Trouble, by_node
from oat_dist.doctor.rows import PASS, SKIP, WARN, Row
from oat_dist.errors import OatError

__all__ = ["DEFAULT_GRACE", "gpus_here", "grace_period", "job_facts", "judge"]

DEFAULT_GRACE = 120.0
_SECONDS = 20.0
_SIGNAL = re.compile(r"^#SBATCH\s(?:.*\s)?--signal[=\s]\S*@(\d+)", re.MULTILINE)
_SHORT_SECONDS = 600.0


def job_facts() -> dict[str, str] | None:
    """``scontrol show job``; None outside of a job.

    Raises:
        OatError: Slurm does not answer.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    text = _ask("scontrol", "show", "job", "-o", job)
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise OatError(
            f"{command[0]} is not there, though SLURM_JOB_ID is set; put Slurm's commands on the PATH, in a container "
            "too"
        ) from None
    except subprocess.TimeoutExpired:
        raise OatError(f"{' '.join(command)}: no answer in {_SECONDS:.0f} s; is the controller up?") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise OatError(f"{' '.join(command)}: {said[0] if said else error}; is the controller up?") from error
    return done.stdout


def grace_period(given: float | None, job: dict[str, str] | Trouble | None) -> tuple[float, str]:
    """Seconds from the signal to the end, and where they are said.

    Raises:
        OatError: OAT_GRACE_SECONDS is no number.
    """
    if given is not None:
        return given, "--grace"
    text = os.environ.get("OAT_GRACE_SECONDS")
    if text:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise OatError(f"OAT_GRACE_SECONDS={text!r} is no number of seconds; set it to one, or unset it")
        return seconds, "OAT_GRACE_SECONDS"
    if isinstance(job, dict) and job.get("BatchFlag") != "0":
        try:
            found = _SIGNAL.search(_ask("scontrol", "write", "batch_script", os.environ["SLURM_JOB_ID"], "-"))
        except OatError:  # not every site lets users read it: the default says that it is one
            found = None
        if found:
            return float(found[1]), "--signal in the batch script"
    return DEFAULT_GRACE, "assumed: give --grace SECONDS, or OAT_GRACE_SECONDS"


def gpus_here() -> int | None:
    """GPUs that Slurm has given this job on this node; None: it does not say."""
    text = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(text) if text.isdigit() else None


def judge(
    job: dict[str, str] | Trouble | None,
    places: Sequence[Place],
    gpus: Sequence[int | None],
    device: str,
) -> list[Row]:
    """`gpus`: of each rank's node, as `gpus_here`."""
    if job is None:
        return [Row("slurm", SKIP, "not in a Slurm job (SLURM_JOB_ID is not set)")]
    rows = []
    if isinstance(job, Trouble):
        rows.append(Row("slurm", WARN, job.found, job.remedy))
    else:
        rows += _judge_job(job)
    nodes = by_node(places)
    given = {place.node: count for place, count in zip(places, gpus, strict=True) if count is not None}
    for node, count in given.items():
        used = len(nodes[node]) if device == "cuda" else 0
        if count > used:
            what = f"{used} of them are used" if device == "cuda" else "the processes run on the CPU"
            rows.append(
                Row(
                    "slurm",
                    WARN,
                    f"{count} GPU(s) are allocated on {node}, and {what}",
                    f"--ntasks-per-node={count}, or ask for fewer; ACCELERATE_USE_CPU must not be set for GPUs",
                )
            )
            break
    return rows


def _judge_job(job: dict[str, str]) -> list[Row]:
    rows = []
    restarts, limit = job.get("Restarts", "?"), job.get("TimeLimit", "?")
    left = _seconds_left(job.get("EndTime", ""))
    left_text = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
    text = f"time limit {limit}{left_text}; restarts {restarts}"
    ours = job.get("Command", "").endswith("/doctor.sbatch")  # it wants an answer, not persistence
    if job.get("Requeue") == "0" and not ours:
        rows.append(
            Row("slurm", WARN, f"the job is not requeued after preemption or a lost node; {text}", "sbatch --requeue")
        )
    if left is not None and left < _SHORT_SECONDS and not ours:
        rows.append(Row("slurm", WARN, f"it ends soon: {text}", "sbatch --time=..."))
    return rows or [Row("slurm", PASS, f"{'' if ours else 'requeued when preempted; '}{text}")]


def _seconds_left(end: str) -> float | None:
    try:
        return (datetime.datetime.fromisoformat(end) - datetime.datetime.now()).total_seconds()
    except ValueError:  # "Unknown", "UNLIMITED"
        return None
