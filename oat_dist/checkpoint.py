"""Checkpoints that are either absent or complete, in safetensors and JSON only.

``checkpoints/step-<n>/`` holds
    model.safetensors         the network's state dict, nothing else; with optim.ema the average
    raw.safetensors           with optim.ema: the weights that training goes on with
    model.json                what it is: architecture, classes, preprocessing, anchor settings
    anchor.safetensors        the stored anchor, once there is one
    optimizer.safetensors     ``<state>/<parameter>``, e.g. ``momentum_buffer/features.0.weight``
    state.json                step, phase, best so far, configuration, data digest
    rank-<r>.safetensors      random number generators and running sums of rank r
    manifest.json             size and SHA-256 of every other file; written last

A save happens in a hidden folder, which is renamed when everything in it is on disk. After each stage the ranks agree
on success by an all-reduce, so that a full disk on one of them stops all of them instead of hanging the others. A
process of an older start of the run that still lives is fenced off (`oat_dist.fence`). The previous checkpoints are
pruned only afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oat_dist.distributed import World
from oat_dist.errors import CheckpointError
from oat_dist.fence import Fence
from oat_dist.files import fsync_file, fsync_folder, sha256_file, write_atomic

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "chosen_checkpoint",
    "find_checkpoint",
    "has_checkpoints",
]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder whose checksums have been verified."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{self.folder / name}: cannot be loaded ({error})") from error

    def json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:  # not JSON, or not even text
            raise CheckpointError(f"{path}: cannot be loaded ({error})") from error


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file of its manifest is there with its checksum.

    Raises:
        CheckpointError: the file system does not let us read it, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (*_ABSENT, ValueError, KeyError, TypeError, AttributeError):  # absent, not text, not JSON, not ours
        return f"{folder / _MANIFEST} is missing or damaged"
    except OSError as error:
        raise _unreadable(folder / _MANIFEST, error) from error
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name:
            return f"{folder / _MANIFEST} names {name!r}, which is not a plain file name"
        try:
            if (path.stat().st_size, sha256_file(path)) != expected:
                return f"{path} is damaged (checksum differs)"
        except (*_ABSENT, ValueError) as error:  # also: a training has just pruned it; a name that none can have
            return f"{path} is missing ({error})"
        except OSError as error:
            raise _unreadable(path, error) from error
    return None


_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); mend that and start again")


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint a user means by `path`: a checkpoint folder, or a run folder (its newest valid one).

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if _step_of(path.absolute()) is not None and not (path / "checkpoints").is_dir():
        if len(path.parts) < 3 or ".." in path.parts:  # its run is known from its path
            path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, absolute() keeps ".."
        problem = verify(path) if path.is_dir() else "no such folder"
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        return Checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder (output_dir) or one of its checkpoints")
    newest, damaged = _newest(path / "checkpoints")
    if newest is None:
        why = f"; {damaged[0]}" if damaged else ""
        raise CheckpointError(f"{path}: no valid checkpoint in this run folder{why}")
    return newest


def chosen_checkpoint(run: Path, name: str | None) -> Checkpoint:
    """The checkpoint `name` of a run folder: latest (also None), best or step-<n>.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if name is None or name == "latest":
        return find_checkpoint(run)
    if name == "best":
        path = run / "checkpoints" / "best"
        try:
            name = path.read_text().strip()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: this run has no best checkpoint yet; use --checkpoint latest") from None
    if not name.startswith("step-"):
        raise CheckpointError(f"--checkpoint {name}: must be latest, best or step-<n>")
    return find_checkpoint(run / "checkpoints" / name)


def has_checkpoints(run: Path) -> bool:
    """Whether a run folder holds checkpoints, whole or damaged."""
    return bool(_steps(run / "checkpoints"))


def _step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder; None for anything else, such as a user's copy ``step-5-backup``."""
    match = re.fullmatch(r"step-(0|[1-9][0-9]*)", folder.name, re.ASCII)
    return int(match[1]) if match else None


def _steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders below `root`, newest first; whole or damaged."""
    return sorted((step for folder in root.glob("step-*") if (step := _step_of(folder)) is not None), reverse=True)


def _newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint below `root`, and what was wrong with the newer ones."""
    problems: list[str] = []
    for step in _steps(root):
        problem = verify(root / f"step-{step}")
        if problem is None:
            return Checkpoint(root / f"step-{step}"), problems
        problems.append(problem)
    return None, problems


class CheckpointStore:
    """The checkpoints of one run, as the processes of one attempt see them.

    Args:
        root: the run's ``checkpoints`` folder, on a file system that all ranks share.
        world: the processes.
        keep: newest checkpoints to keep; the best one is kept besides.
        fence: this start's claim on `root`; None: a new one is made.
    """

    def __init__(self, root: Path, world: World, keep: int, fence: Fence | None = None) -> None:
        self.root = root
        self.world = world
        self.keep = keep
        self.fence = fence or Fence.new(root, world)
        if fence is None:
            world.together(lambda: self.fence.claim() if world.is_main else None)
        world.together(self._see)
        self._saved_time = time.monotonic()

    def _see(self) -> None:
        if not (self.root / "attempt").is_file():
            raise CheckpointError(
                f"{self.root}: not visible to every rank; output_dir must lie on a shared file system"
            )

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid checkpoint, the same on all ranks, and what was wrong with newer ones.

        Those are renamed to ``aside-step-<n>``: nobody will take them for checkpoints, and nothing is lost.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged: starting anew would overwrite them.
        """
        return self.world.gather_objects(self.world.together(self._find))[0]

    def _find(self) -> tuple[Checkpoint | None, list[str]]:
        if not self.world.is_main:
            return None, []
        found, problems = _newest(self.root)
        if found is None and problems:
            raise CheckpointError(
                f"{self.root}: every checkpoint is damaged: {problems[0]}; restore one, or choose another output_dir"
            )
        for step in _steps(self.root):
            if found is not None and step > found.step:
                _set_aside(self.root / f"step-{step}")
        return found, problems

    def point(self, newest: Checkpoint, best: int | None) -> None:
        """Let ``latest`` and ``best`` name what a resumed run has; a kill may have come before they were written."""
        if self.world.is_main:
            write_atomic(self.root / "latest", newest.folder.name + "\n")
            if best is not None and (self.root / f"step-{best}").is_dir():
                write_atomic(self.root / "best", f"step-{best}\n")
            else:
                (self.root / "best").unlink(missing_ok=True)

    def minutes_passed(self, minutes: float) -> bool:
        """Whether so many have passed since the last save, or the start; the same on all ranks. 0: never."""
        if minutes == 0:
            return False
        passed = (time.monotonic() - self._saved_time) / 60 >= minutes and self.world.is_main
        return not self.world.all_agree(not passed)  # rank 0's clock decides for all

    def take(self, best: Checkpoint) -> None:
        """Copy the best checkpoint of another run, older than the one that this run begins with.

        Raises:
            CheckpointError: as `save`.
        """
        self._stage(self._copy, best.folder)

    def save(
        self,
        step: int,
        shared: Mapping[str, Mapping[str, Tensor] | str],
        own: Mapping[str, Tensor],
        best: bool,
    ) -> Path:
        """Save one checkpoint; every rank calls it at the same step.

        Args:
            step: optimizer steps done.
            shared: file name to tensors or text; rank 0's are written.
            own: this rank's tensors.
            best: whether ``checkpoints/best`` shall name it.

        Raises:
            CheckpointError: on every rank, when one of them could not write, or a newer attempt has taken over.
        """
        final = self.root / f"step-{step}"
        folder = self.fence.staging
        self._stage(self._make_folder, folder)
        digests = self.world.gather_objects(self._stage(self._write, folder, shared, own))
        self._stage(self._publish, folder, final, {k: v for part in digests for k, v in part.items()}, best)
        self._saved_time = time.monotonic()
        return final

    def best(self) -> str | None:
        return _named(self.root / "best")

    def _stage(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run one stage of a save on every rank; raise on all of them when it fails on one."""
        try:
            return self.world.together(_named_errors, self.root, action, *arguments)
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(self.fence.staging, ignore_errors=True)
            raise

    def _make_folder(self, folder: Path) -> None:
        if self.world.is_main:
            self.fence.check()
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()

    def _write(
        self, folder: Path, shared: Mapping[str, Mapping[str, Tensor] | str], own: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        files: dict[str, Mapping[str, Tensor] | str] = {f"rank-{self.world.rank:05d}.safetensors": own}
        if self.world.is_main:
            files.update(shared)
        written = {}
        for name, content in files.items():
            path = folder / name
            if isinstance(content, str):
                path.write_text(content)
            else:
                save_file({key: value.contiguous() for key, value in content.items()}, path)
            fsync_file(path)
            written[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        return written

    def _copy(self, folder: Path) -> None:
        if not self.world.is_main:
            return
        self.fence.check()
        shutil.copytree(folder, self.fence.staging)
        for path in self.fence.staging.iterdir():
            fsync_file(path)
        self.fence.check()
        self.fence.staging.rename(self.root / folder.name)
        fsync_folder(self.root)

    def _publish(self, folder: Path, final: Path, files: dict[str, dict[str, Any]], best: bool) -> None:
        if not self.world.is_main:
            return
        text = json.dumps({"attempt": self.fence.token, "world_size": self.world.size, "files": files}, indent=1)
        (folder / _MANIFEST).write_text(text + "\n")
        fsync_file(folder / _MANIFEST)
        fsync_folder(folder)
        self.fence.check()
        try:
            folder.rename(final)  # not over another: had a newer start published it since, it would be lost
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self.fence.check()
            _set_aside(final)  # of a start from which this one does not descend
            folder.rename(final)
        fsync_folder(self.root)
        self.fence.check()  # a newer start may have come since: it reads and removes checkpoints itself
        write_atomic(self.root / "latest", final.name + "\n")
        if best:
            write_atomic(self.root / "best", final.name + "\n")
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Remove what is neither among the newest `keep` nor the best. `newest` has just been written and verified."""
        steps = _steps(self.root)
        kept = {newest.name, self.best(), *(f"step-{step}" for step in steps[: self.keep])}
        for step in steps:
            if f"step-{step}" not in kept:
                shutil.rmtree(self.root / f"step-{step}")


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"aside-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def _named_errors(root: Path, action: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return action(*arguments)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{root}: the checkpoint could not be saved: {error}; older ones are kept") from error


def _named(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None
