"""Being asked to stop: by a signal, by a file that appears, by Ctrl-C.

Signals are heard by a thread, through `signal.set_wakeup_fd`: Python itself would answer them only between two
instructions of the main thread, which may sit in a collective or a long kernel. Hearing one changes nothing by itself;
the training asks (`oat_dist.pulse`), so that all ranks stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from oat_dist.errors import ConfigError

__all__ = ["StopRequests", "signal_numbers", "sigterm_unwinds"]

# What schedulers, launchers and people send to ask for something.
_CHOICES = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "XCPU")

# One Ctrl-C can arrive twice, from the terminal and from a launcher that passes it on; a person is slower.
_SAME_SECONDS = 0.3


def signal_numbers(names: Sequence[str]) -> list[signal.Signals]:
    """``["USR1", "SIGTERM"]`` as signals.

    Raises:
        ConfigError: a name that is none of `_CHOICES`.
    """
    found: list[signal.Signals] = []
    for name in names:
        short = name.upper().removeprefix("SIG")
        if short not in _CHOICES:
            raise ConfigError(f"job.stop_signals: {name!r} is not one of {', '.join(_CHOICES)}")
        found.append(signal.Signals[f"SIG{short}"])
    return found


class StopRequests:
    """Whether anybody has asked this process to stop.

    Args:
        signals: that mean it.
        stop_file: looked for by rank 0; None: no file.
        speaks: whether this process tells the user that it has heard Ctrl-C.

    Attributes:
        say: how: plainly, unless somebody draws on the terminal meanwhile.
    """

    def __init__(
        self, signals: Sequence[signal.Signals] = (), stop_file: Path | None = None, speaks: bool = False
    ) -> None:
        self.stop_file = stop_file
        self.heard: signal.Signals | None = None
        self.say: Callable[[str], None] = _say
        self._signals = frozenset(signals)
        self._speaks = speaks
        self._interrupted_at: float | None = None

    def file_there(self) -> bool:
        return self.stop_file is not None and self.stop_file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals for as long as the block runs, which must be in the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = {number: signal.signal(number, lambda *_: None) for number in self._signals}
        wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(reading,), name="oat-signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)  # ends the listener
            listener.join()
            os.close(reading)

    def _listen(self, reading: int) -> None:
        while received := os.read(reading, 64):
            for number in received:
                if number in self._signals:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        self.heard = self.heard or number
        now = time.monotonic()
        if self._interrupted_at is None:
            if number == signal.SIGINT:
                self._interrupted_at = now
                if self._speaks:
                    self.say("stopping after this step, and saving (Ctrl-C again: stop at once, without saving)")
        # torchrun and accelerate pass a second Ctrl-C on as SIGTERM.
        elif number in (signal.SIGINT, signal.SIGTERM) and now - self._interrupted_at > _SAME_SECONDS:
            if self._speaks:
                _say("stopped at once, nothing saved; the run resumes from its newest checkpoint")
            os._exit(130)  # the main thread may be deep in a collective: nothing else ends it for sure


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """For commands with nothing to save: SIGTERM (a scheduler's) ends them as Ctrl-C does, so that nothing is left."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())
