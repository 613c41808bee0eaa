"""A rank that stands still says where, and ends: nobody finds out on Monday that a run has hung since Friday.

When one rank hangs, the others wait for it in a collective. So each rank watches itself: after too long without a sign
of life it writes the stack of all its threads, every line with its rank, and exits. The rank whose stack is not in a
collective is the one to look at; a rank that wrote none was stopped, or its machine is gone.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HUNG", "Watchdog"]

HUNG = 75  # exit status EX_TEMPFAIL: worth another try


class Watchdog:
    """Ends this process when `beat` has not been called for `seconds`.

    Args:
        seconds: without a sign of life that count as a hang.
        rank: stands before every line of the stack.
        grace: seconds that a rank which has written its stack leaves the others for theirs: a launcher ends them all
            once one has ended.
    """

    def __init__(self, seconds: float, rank: int, grace: float = 5.0) -> None:
        self.seconds = seconds
        self.rank = rank
        self.grace = grace
        self._last = time.monotonic()
        self._doing = "starting"
        self._ended = threading.Event()

    def beat(self, doing: str) -> None:
        """A sign of life; `doing` is what comes next."""
        self._last = time.monotonic()
        self._doing = doing

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.beat("starting")
        watcher = threading.Thread(target=self._watch, name="oat-watchdog", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 10)):
            # Should a thread in foreign code keep Python's lock, this thread never comes back here; then faulthandler
            # does it alone, from outside of Python.
            faulthandler.dump_traceback_later(self.seconds + 2 * self.grace, exit=True, file=2)
            if time.monotonic() - self._last > self.seconds:
                self._report()
                time.sleep(self.grace)
                os._exit(HUNG)

    def _report(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stack = file.read().decode(errors="replace")
        lines = [
            f"error: no sign of life for {self.seconds:g} s (engine.timeout_minutes) while {self._doing}, on "
            f"{socket.gethostname()}, process {os.getpid()}: this rank hangs, or waits for one that does. Its stack:",
            *stack.splitlines(),
        ]
        text = "".join(f"[rank {self.rank}] {line}\n" for line in lines)
        os.write(2, text.encode())
