"""Runs jobs in several processes, or in threads where a process must not be forked.

Forked processes inherit whatever the tasks refer to, so nothing is pickled: lambdas and open archives work. Jobs and
replies are JSON over sockets. An error or Ctrl-C ends all processes at once, and so does the death of this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, Protocol

from oat_dist.errors import DataError, OatError

__all__ = ["Advance", "Rest", "Task", "Workers", "can_fork", "start_workers"]

Advance = Callable[[int], None]
# A task does one job, a list of whole numbers and texts, and counts its progress. What it returns is the rest of the
# job, waiting for the disk rather: it is called while the next job is begun.
Rest = Callable[[], None] | None
Task = Callable[[list[Any], Advance], Rest]

_MESSAGE_BYTES = 1 << 16
_TEXT_CHARACTERS = 1 << 12  # JSON may write six bytes for one
_SECONDS_BETWEEN_REPORTS = 0.1
_PR_SET_PDEATHSIG = 1


class Workers(Protocol):
    def run(self, task: str, jobs: Sequence[list[Any]], advance: Advance) -> None:
        """Do all `jobs` with the task of that name, in any order; the first error is raised."""


def can_fork() -> bool:
    """Whether forking is safe: no other thread of Python may hold a lock, and torch's threads do not survive it."""
    alone = threading.active_count() == 1 and threading.current_thread() is threading.main_thread()
    return alone and "torch" not in sys.modules


@contextlib.contextmanager
def start_workers(count: int, tasks: Mapping[str, Task]) -> Iterator[Workers]:
    """`count` processes if this one may be forked, else threads; they end with the context."""
    if count > 1 and can_fork():
        with _processes(count, tasks) as processes:
            yield processes
    else:
        with _Threads(count, tasks) as threads:
            yield threads


class _StoppedError(Exception):
    """Another job has failed: this one is to end."""


class _Threads:
    def __init__(self, count: int, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self._pool = ThreadPoolExecutor(count)
        self._events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def run(self, task: str, jobs: Sequence[list[Any]], advance: Advance) -> None:
        for job in jobs:
            self._pool.submit(self._work, self._tasks[task], job)
        left = len(jobs)
        while left:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                advance(event)

    def _work(self, task: Task, job: list[Any]) -> None:
        counter = _Counter(self._events.put)

        def advance(count: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            counter.advance(count)

        try:
            rest = task(job, advance)
            counter.flush()
            if rest is not None:
                rest()
            self._events.put(None)
        except _StoppedError:
            pass
        except BaseException as error:
            self._events.put(error)


class _Processes:
    """The parent's side: a process id and a socket for each worker."""

    def __init__(self) -> None:
        self.workers: dict[socket.socket, int] = {}

    def run(self, task: str, jobs: Sequence[list[Any]], advance: Advance) -> None:
        waiting = deque(jobs)
        left = len(jobs)
        with selectors.DefaultSelector() as selector:
            for idle in list(self.workers)[: len(jobs)]:
                selector.register(idle, selectors.EVENT_READ)
                self._send(idle, [task, waiting.popleft()])
            while left:
                for key, _ in selector.select():
                    link = key.fileobj
                    assert isinstance(link, socket.socket)
                    reply = self._receive(link)
                    if reply["event"] == "advance":
                        advance(reply["count"])
                    elif reply["event"] == "error":
                        _raise(reply)
                    elif reply["event"] == "done":
                        left -= 1
                    elif waiting:  # "ready" for the next one
                        self._send(link, [task, waiting.popleft()])

    def _send(self, link: socket.socket, message: object) -> None:
        try:
            link.send(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            self._died(link)

    def _receive(self, link: socket.socket) -> dict[str, Any]:
        try:
            message = link.recv(_MESSAGE_BYTES)
        except ConnectionResetError:
            message = b""
        if not message:
            self._died(link)
        return json.loads(message)

    def _died(self, link: socket.socket) -> NoReturn:
        code = _wait(self.workers.pop(link))
        link.close()
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
        raise DataError(f"a worker process {how}; if memory ran out, use fewer workers")

    def end(self, *, kill: bool) -> None:
        for link, process in self.workers.items():
            if kill:
                os.kill(process, signal.SIGKILL)
            link.close()  # an idle worker ends by itself
        for process in self.workers.values():
            _wait(process)
        self.workers.clear()


def _wait(process: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:  # our caller ignores SIGCHLD: the kernel has forgotten the process already
        return 1


@contextlib.contextmanager
def _processes(count: int, tasks: Mapping[str, Task]) -> Iterator[_Processes]:
    parent = os.getpid()
    processes = _Processes()
    sys.stdout.flush()
    sys.stderr.flush()  # or every child would write again what waits there
    try:
        # A Ctrl-C goes to all processes of the terminal; only this one shall take it, from the first moment on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with warnings.catch_warnings():
                    # Python 3.12 warns of any second thread; ours are native ones of NumPy, idle and safe to lose
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process = os.fork()
                if process == 0:
                    for link in (ours, *processes.workers):
                        link.close()
                    _become_worker(theirs, tasks, parent)
                theirs.close()
                processes.workers[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield processes
    except BaseException:
        processes.end(kill=True)
        raise
    processes.end(kill=False)


def _become_worker(link: socket.socket, tasks: Mapping[str, Task], parent: int) -> NoReturn:
    """The whole life of a forked child: it never returns into the code of its parent."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        gc.freeze()  # a collection would write to, and so copy, all the memory that is shared with the parent
        if os.getppid() == parent:
            _serve(link, tasks)
            status = 0
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve(link: socket.socket, tasks: Mapping[str, Task]) -> None:
    def send(**reply: object) -> None:
        link.send(json.dumps(reply).encode())

    def finish(rest: Rest) -> None:
        with _reported(send):
            if rest is not None:
                rest()
            send(event="done")

    with ThreadPoolExecutor(1) as background:
        unfinished: Future[None] | None = None
        while message := link.recv(_MESSAGE_BYTES):
            task, job = json.loads(message)
            counter = _Counter(lambda count: send(event="advance", count=count))
            with _reported(send):
                rest = tasks[task](job, counter.advance)
                counter.flush()
                if unfinished is not None:
                    unfinished.result()  # one at a time: it holds a file
                send(event="ready")  # always before the "done" of the same job, so none is left over for the next run
                unfinished = background.submit(finish, rest)


@contextlib.contextmanager
def _reported(send: Callable[..., None]) -> Iterator[None]:
    """Send an error to the parent, who will end us."""
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OatError as error:
        send(event="error", kind="data", text=str(error)[:_TEXT_CHARACTERS])
    except OSError as error:
        send(event="error", kind="system", number=error.errno, text=error.strerror, file=_text(error.filename))
    except MemoryError:
        send(event="error", kind="data", text="memory ran out in a worker process; use fewer workers")
    except Exception:
        send(event="error", kind="defect", text=traceback.format_exc()[-_TEXT_CHARACTERS:])


class _Counter:
    """Sends counts on a few times a second."""

    def __init__(self, send: Advance) -> None:
        self._send, self._count, self._sent = send, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent > _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._send(self._count)
        self._count, self._sent = 0, time.monotonic()


def _text(name: object) -> str | None:
    return None if name is None else os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)


def _raise(reply: dict[str, Any]) -> NoReturn:
    if reply["kind"] == "data":
        raise DataError(reply["text"])
    if reply["kind"] == "system":
        raise OSError(reply["number"], reply["text"], reply["file"])
    raise RuntimeError(f"a worker process failed:\n{reply['text']}")
