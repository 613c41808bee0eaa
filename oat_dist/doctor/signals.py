"""Whether a request to stop reaches the training: no signal is ignored or blocked, and each is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from oat_dist.config import Config
from oat_dist.doctor.looks import Place, Trouble, ranks_text, trouble_rows
from oat_dist.doctor.rows import FAIL, PASS, SKIP, WARN, Row
from oat_dist.stopping import StopRequests, signal_numbers

__all__ = ["Heard", "check_delivery", "judge", "look"]

_HEARD_SECONDS = 2.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Heard:
    """Names of signals: those that this process was started with ignored or blocked, and those it does not hear."""

    ignored: tuple[str, ...]
    blocked: tuple[str, ...]
    unheard: tuple[str, ...]


def look(config: Config) -> Heard:
    """Send each of job.stop_signals to this process, and listen as the training does. In the main thread."""
    wanted = signal_numbers(config.job.stop_signals)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return Heard(
        _names(number for number in wanted if signal.getsignal(number) == signal.SIG_IGN),
        _names(number for number in wanted if number in masked),
        _names(number for number in wanted if not _is_heard(number)),
    )


def _names(numbers: Iterator[signal.Signals]) -> tuple[str, ...]:
    return tuple(number.name for number in numbers)


def _is_heard(number: signal.Signals) -> bool:
    requests = StopRequests([number])
    with requests.listening():
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + _HEARD_SECONDS
        while requests.heard is None and time.monotonic() < deadline:
            time.sleep(0.005)
        signal.sigtimedwait([number], 0)  # a blocked one would be delivered later, when nobody listens
    return requests.heard is not None


def judge(found: Sequence[Heard | Trouble], places: Sequence[Place], config: Config) -> list[Row]:
    rows = trouble_rows("signals", found, places)
    seen: list[tuple[Heard, Place]] = [
        (one, place) for one, place in zip(found, places, strict=True) if not isinstance(one, Trouble)
    ]
    for status, what, remedy in (
        (FAIL, "unheard", "mend what starts the processes: it blocks the signal"),
        (WARN, "blocked", "something that started the processes blocks it: start them from a plain shell, or by srun"),
        (WARN, "ignored", "a background shell (&) or nohup does that: start it in the foreground, by srun or setsid"),
    ):
        for names in dict.fromkeys(getattr(heard, what) for heard, _ in seen):
            there = [place for heard, place in seen if names and getattr(heard, what) == names]
            if there:
                where = "" if len(there) == len(places) else f" [on {ranks_text(there)}]"
                words = {"unheard": "not heard when sent", "blocked": "blocked", "ignored": "ignored at the start"}
                rows.append(Row("signals", status, f"{', '.join(names)} {words[what]}{where}", remedy))
    if rows:
        return rows
    heard_names = ", ".join(number.name for number in signal_numbers(config.job.stop_signals))
    return [Row("signals", PASS, f"{heard_names or 'none'}: heard by every rank")]


def check_delivery(config: Config, job: dict[str, str] | Trouble | None) -> Row:
    """On rank 0, last of all: ask Slurm to signal the batch script, and wait for job.stop_file.

    A script without a trap dies of the signal, and Slurm ends us: that is heard, too, and reported.

    Args:
        job: what the scheduler says of this job; None: there is none.
    """
    stop_file = None if config.job.stop_file is None else Path(config.job.stop_file)
    if stop_file is not None and stop_file.exists():
        return Row(
            "delivery",
            WARN,
            f"job.stop_file={stop_file} is there already: a training would stop at once",
            f"remove it: rm {stop_file}",
        )
    if job is None:
        return Row("delivery", PASS, "no scheduler whose signals could get lost (SLURM_JOB_ID is not set)")
    if stop_file is None:
        return Row("delivery", SKIP, "no job.stop_file: signals have to reach the ranks themselves (see signals)")
    if not isinstance(job, Trouble) and job.get("BatchFlag") == "0":
        return Row("delivery", SKIP, "an interactive job (salloc) has no batch script that Slurm could signal")
    return _signal_batch_script(stop_file, os.environ["SLURM_JOB_ID"])


def _signal_batch_script(stop_file: Path, job: str) -> Row:
    remedy = (
        "the batch script must trap USR1 and touch job.stop_file, on a file system that rank 0 sees, and wait for srun "
        "in a loop: see launch/slurm/train.sbatch"
    )
    if _traps_usr1(job) is False:  # it would die, and the job with it, before anybody has read the table
        return Row("delivery", FAIL, "not tried: the batch script has no trap for USR1, and would die of it", remedy)
    print("asking Slurm to send USR1 to the batch script (which would die without a trap)", file=sys.stderr, flush=True)
    started = time.monotonic()
    ended = threading.Event()
    with _noticing(signal.SIGTERM, ended):
        command = ["scancel", "--batch", "--signal=USR1", job]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_STOP_SECONDS)
        except FileNotFoundError:
            return Row("delivery", WARN, "scancel is not there, so it could not be tried", "put it on the PATH")
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return Row("delivery", FAIL, f"{' '.join(command)}: {said[0] if said else 'failed'}", "ask your site why")
        while time.monotonic() - started < _STOP_SECONDS and not ended.is_set():
            if stop_file.exists():
                stop_file.unlink(missing_ok=True)
                seconds = time.monotonic() - started
                return Row("delivery", PASS, f"USR1 to the batch script made job.stop_file appear in {seconds:.1f} s")
            ended.wait(0.1)
    if ended.is_set():
        return Row("delivery", FAIL, "the batch script died of USR1, and with it the job", remedy)
    return Row("delivery", FAIL, f"{stop_file} did not appear {_STOP_SECONDS:.0f} s after USR1 was sent", remedy)


def _traps_usr1(job: str) -> bool | None:
    """Whether the shell of the batch script, which runs on rank 0's node, catches USR1; None: it is not seen here."""
    script = f"/job{int(job):05d}/slurm_script".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if any(word.endswith(script) for word in (process / "cmdline").read_bytes().split(b"\0")):
                status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
                return bool(int(status["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1)
    return None


@contextmanager
def _noticing(number: signal.Signals, event: threading.Event) -> Iterator[None]:
    before = signal.signal(number, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(number, before)
