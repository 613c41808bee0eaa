"""One line that says how a run stands, for the script that started it: ``STATE STEP TOTAL``.

Exit codes do not travel well: launchers turn every one into 1. `STATE` is "running" (and still is if the run was
killed), "finished", "stopped" (saved on request, more to do), "refused" (the same command would fail again) or
"failed"; `STEP` is the step of the newest checkpoint, by which a script sees progress.
"""

from __future__ import annotations

import sys
from pathlib import Path

from oat_dist.distributed import World
from oat_dist.files import write_atomic

__all__ = ["end_outcome", "write_outcome"]


def write_outcome(path: str | None, world: World, state: str, step: int, total: int) -> None:
    """Write the line, on rank 0; nothing where `path` is None."""
    if path is not None and world.is_main:
        _write(Path(path), f"{state} {step} {total}")


def end_outcome(path: str | None, state: str) -> None:
    """Change the state and keep the steps; for a process that knows no more of the run than that it has failed."""
    if path is None:
        return
    try:
        steps = " ".join(Path(path).read_text().split()[1:3])
    except OSError:
        steps = ""
    _write(Path(path), f"{state} {steps or '0 0'}")


def _write(path: Path, line: str) -> None:
    try:
        write_atomic(path, line + "\n")
    except OSError as error:  # the run itself is worth more than a word about it
        print(f"warning: job.outcome_file={path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
