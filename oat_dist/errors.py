"""Errors that a user can act on: one line saying what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "OatError",
    "TrainingError",
    "loss_not_finite",
    "not_finite",
    "run_command",
]


_GRACE_SECONDS = 20.0


class OatError(ValueError):
    """Base of all errors caused by input, settings or the environment rather than by a defect of ours.

    `everywhere` says that every rank raises the same error, so that one of them printing it is enough; `permanent`
    that the same command would fail again, so that nobody should start it again by itself.
    """

    everywhere = False
    permanent = False


class ConfigError(OatError):
    """A setting that is unknown, impossible, or would hang or lie."""

    everywhere = True
    permanent = True


class DataError(OatError):
    """An image, shard, index or manifest that cannot be used."""


class LaunchError(OatError):
    """Processes or devices that are not the ones asked for."""


class CheckpointError(OatError):
    """A checkpoint that is torn, damaged, or belongs to something else."""


class TrainingError(OatError):
    """Training that cannot go on: a non-finite loss, memory that does not suffice."""


def loss_not_finite(step: int, epoch: int, phase: str, folder: Path) -> TrainingError:
    """The stop at a loss that is NaN or infinite, with the remedy. `epoch` starts at 0."""
    remedy = "lower optim.lr or set optim.clip_norm"
    if phase == "oat":
        remedy += ", or bound the targets with anchor.floor or anchor.center=probabilities"
    return not_finite(
        f"the loss is not finite at step {step:,} (epoch {epoch + 1}, phase {phase}); {remedy}; "
        f"{folder} keeps its checkpoints from before"
    )


def not_finite(text: str) -> TrainingError:
    """Numbers that are the same on every rank have turned NaN or infinite."""
    error = TrainingError(text)
    error.everywhere = error.permanent = True
    return error


def _shown(text: str) -> str:
    """`text` without what would steer a terminal: names out of strangers' files stand in errors."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def run_command(command: Callable[[], int]) -> int:
    """Run `command`, turning what a user can mend into one line on stderr and exit status 2."""
    try:
        return command()
    except OatError as error:
        if error.everywhere and os.environ.get("RANK", "0") != "0":
            # Rank 0 says it. The launcher ends us once it has; exiting first would end rank 0 before it speaks.
            time.sleep(_GRACE_SECONDS)
        print(f"error: {_shown(str(error))}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `oat-dist ... | head`: the reader has gone, and that is its right
        sys.stderr.close()
        return 141
    except OSError as error:
        # A full disk, a folder without permission: the system's words say what, and mostly where.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror}; mend that and start again", file=sys.stderr, flush=True)
        return 2
