"""What all ranks must agree on while they train: whether to stop, and that this start of the run is still the newest.

Each rank may hear a signal at another moment, and only rank 0 looks for files. So now and then, about every
``job.check_seconds``, one small all-reduce tells everyone what any of them knows, after the same step on all ranks. The
number of steps until the next time travels with it: rank 0 measures how long steps take, so that neither short steps
pay for it nor long ones make a stop late.
"""

from __future__ import annotations

import signal
import time

from oat_dist.distributed import World
from oat_dist.fence import Fence
from oat_dist.stopping import StopRequests
from oat_dist.watchdog import Watchdog

__all__ = ["Pulse"]

_FILE = 1000  # stands for the stop file where others stand for signals


class Pulse:
    """Asked after every step and every batch of an evaluation, equally often on all ranks.

    Args:
        world: the processes.
        requests: who may ask this process to stop; None: nobody.
        watchdog: told of every beat; None: nobody watches.
        seconds: between two times that the ranks agree.

    Attributes:
        stopping: why the run is to stop, the same on all ranks; empty while it is not.
    """

    def __init__(
        self,
        world: World,
        requests: StopRequests | None = None,
        watchdog: Watchdog | None = None,
        seconds: float = 1.0,
    ) -> None:
        self.world = world
        self.requests = requests or StopRequests()
        self.watchdog = watchdog
        self.seconds = seconds
        self.fence: Fence | None = None
        self.stopping = ""
        self.restart()

    def restart(self) -> None:
        """Agree at the next beat: what comes now takes its own time."""
        self._ahead = self._left = 1
        self._since = time.monotonic()

    def beat(self, doing: str) -> bool:
        """One more step is done; True when the run is to stop.

        Args:
            doing: what comes next, for the watchdog.

        Raises:
            CheckpointError: on all ranks, when a newer start of the run has taken over.
        """
        if self.watchdog is not None:
            self.watchdog.beat(doing)
        self._left -= 1
        if self._left == 0 and not self.stopping:
            self._agree()
        return bool(self.stopping)

    def _agree(self) -> None:
        main, asked, fenced, ahead = self.world.is_main, 0, False, 0
        if self.requests.heard is not None:
            asked = int(self.requests.heard)
        elif main and self.requests.file_there():
            asked = _FILE
        if main:
            now = time.monotonic()
            wanted = round(self.seconds * self._ahead / max(now - self._since, 1e-6))
            ahead = max(1, min(wanted, 2 * self._ahead))
            self._since = now
            fenced = self._fenced()
        asked, was_fenced, self._ahead = self.world.maximum([asked, int(fenced), ahead])
        self._left = self._ahead
        if was_fenced:
            assert self.fence is not None
            error = self.fence.lost()
            error.everywhere = True
            raise error
        if asked:
            self.stopping = "the stop file appeared" if asked == _FILE else signal.Signals(asked).name

    def _fenced(self) -> bool:
        try:
            return self.fence is not None and not self.fence.held
        except OSError:  # a file system that is away for a moment says nothing of other starts; a save will ask again
            return False
