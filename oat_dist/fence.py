"""Which start of a run may write: the newest one. Every other still alive is a zombie, and must leave things alone.

A scheduler that has lost sight of a node starts the job again elsewhere, and the old processes may live on for a while
or wake up later. So each start of a run puts a token of its own into ``checkpoints/attempt``. Whoever is about to
write looks whether it still is the one he knows. A save in the midst of it cannot slip through either: the newer start
moves every half-written checkpoint out of the way, so that the older one finds nothing left to publish.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from oat_dist.distributed import World
from oat_dist.errors import CheckpointError
from oat_dist.files import write_atomic

__all__ = ["Fence"]


@dataclass(frozen=True)
class Fence:
    """The claim of one start of a run on its ``checkpoints`` folder `root`; every rank has the same `token`."""

    root: Path
    token: str

    @staticmethod
    def new(root: Path, world: World) -> Fence:
        """With a token of its own that all ranks agree on; nothing is claimed yet."""
        return Fence(root, world.gather_objects(uuid.uuid4().hex)[0])

    @property
    def staging(self) -> Path:
        """Where this start puts a checkpoint together."""
        return self.root / f".tmp-{self.token}"

    def claim(self) -> None:
        """From now on only this start may write. One rank calls it."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / "attempt", self.token + "\n")
        # After the token, not before: a zombie could begin another one in between.
        for leftover in [*self.root.glob(".tmp-*"), *self.root.glob(".gone-*")]:
            _remove(leftover)

    @property
    def held(self) -> bool:
        """Whether no newer start has claimed the run."""
        try:
            return (self.root / "attempt").read_text().strip() == self.token
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Refuse to go on as a zombie.

        Raises:
            CheckpointError: a newer start has taken over.
        """
        if not self.held:
            raise self.lost()

    def lost(self) -> CheckpointError:
        return CheckpointError(f"{self.root}: a newer start of this run has taken over; this process must stop")


def _remove(folder: Path) -> None:
    """Take a folder away from whoever still writes in it: first its name, in one stroke, then what is in it."""
    gone = folder.with_name(f".gone-{uuid.uuid4().hex}")
    try:
        folder.rename(gone)
    except FileNotFoundError:  # its owner was faster, and has published or removed it
        return
    shutil.rmtree(gone, ignore_errors=True)  # a zombie may still create files in it: the next start removes the rest
