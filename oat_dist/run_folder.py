"""The folder of a run: its lock, resolved configuration, environment and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from oat_dist.checkpoint import has_checkpoints
from oat_dist.config import Config, to_yaml
from oat_dist.config_keys import JobConfig
from oat_dist.distributed import World
from oat_dist.errors import CheckpointError, OatError, TrainingError
from oat_dist.evaluation_files import write_evaluation
from oat_dist.fence import Fence
from oat_dist.files import FolderBusyError, folder_lock, lock_holder, write_atomic
from oat_dist.results import Evaluation

__all__ = ["RunFolder", "differing", "flatten", "read_config"]

# A start that takes over waits so many job.check_seconds for the older one, which looks once in each, to end.
_TAKE_OVER_CHECKS = 30

# What may change when a run goes on; everything else would make it another run.
_MAY_CHANGE = {
    "output_dir",
    "start_from",  # only a run without checkpoints begins there
    "epochs",
    "max_steps",
    "resume",
    "dry_run",
    "data.path",  # may move; the digest must stay
    "data.workers",
    "data.prefetch",
    "data.on_bad",  # what to do about a damaged image is known only once there is one
    "data.max_bad",
    "data.cache_dir",
    "data.cache_gb",
    "model.gradient_checkpointing",  # the same numbers, in other memory or time
    "engine.name",  # the state is the same for every engine
    "engine.deepspeed",
    "engine.processes",
    "engine.threads",
    "engine.timeout_minutes",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "job.stop_signals",
    "job.stop_file",
    "job.check_seconds",
    "job.outcome_file",
    "job.take_over",
    "eval.every_epochs",
    "eval.batch_size",
    "log.every_steps",
    "log.trackers",
    "log.project",
    "log.profile_steps",
    "log.profile_all_ranks",
}


class RunFolder:
    """What rank 0 writes about a run. On the other ranks every method does nothing.

    Attributes:
        on_line: is given each line of metrics.jsonl once it is written; None: nobody listens.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self.metrics_path = path / "metrics.jsonl"
        self.fence: Fence | None = None  # known while the folder is locked
        self.notes: list[str] = []  # what the user should know of it
        self.on_line: Callable[[dict[str, Any]], None] | None = None

    @contextmanager
    def locked(self, job: JobConfig | None = None) -> Iterator[None]:
        """Hold the folder against a second run, which may well be a rank that does not see the others.

        Args:
            job: with `take_over`, whoever holds it is fenced off, instead of this start being refused.
        """
        self.fence = Fence.new(self.path / "checkpoints", self.world)
        with contextlib.ExitStack() as lock:
            self.world.together(self._lock, lock, job or JobConfig())
            yield

    def _lock(self, lock: contextlib.ExitStack, job: JobConfig) -> None:
        if not self.world.is_main:
            return
        refusal = (
            f"{self.path}: another process is training in this folder{lock_holder(self.path)}; wait for it or choose "
            "another output_dir. If you started several processes for one run, they do not see each other: use "
            "accelerate launch or torchrun with a config file of configs/accelerate/. If it is an older start of this "
            "very run that should have ended, job.take_over=true fences it off"
        )
        assert self.fence is not None
        held = self._holds(lock, "" if job.take_over else refusal)
        self.fence.claim()  # an older start finds out within moments, if it still runs
        deadline = time.monotonic() + _TAKE_OVER_CHECKS * job.check_seconds
        while not held and time.monotonic() < deadline:
            time.sleep(job.check_seconds / 5)
            held = self._holds(lock)
        if not held:
            self.notes.append(
                f"warning: an older start of this run{lock_holder(self.path)} still holds {self.path} and does not "
                "end; it is fenced off and can write no checkpoint, so this one goes on. End it if you can"
            )

    def _holds(self, lock: contextlib.ExitStack, refusal: str = "") -> bool:
        """Try to take the lock; False when another process has it, or an error where there is a text for one."""
        try:
            lock.enter_context(folder_lock(self.path, refusal))
        except FolderBusyError:
            if refusal:
                raise
            return False
        return True

    def adopt(self, config: Config) -> None:
        """Take the folder for `config`, or check that it already is this configuration's.

        A folder in which nothing was saved yet belongs to nobody.

        Raises:
            CheckpointError: the folder belongs to another configuration (the differing keys are named), or holds a
                run while ``resume=false``.
        """
        if not self.world.is_main:
            return
        path = self.path / "config.yaml"
        if has_checkpoints(self.path):
            if not config.resume:
                raise _refused(f"{self.path}: holds a run, and resume=false; choose another output_dir")
            if not path.exists():
                raise CheckpointError(
                    f"{path}: is missing, but there are checkpoints; restore it or choose another output_dir"
                )
            try:
                different = differing(yaml.safe_load(path.read_text()), config)
            except (yaml.YAMLError, AttributeError) as error:
                raise CheckpointError(f"{path}: damaged; restore it or choose another output_dir") from error
            if different:
                changes = "; ".join(f"{key}={before} became {now}" for key, (before, now) in different.items())
                raise _refused(
                    f"{self.path}: belongs to another configuration: {changes}; "
                    "choose another output_dir, or set these back"
                )
        write_atomic(path, to_yaml(config))

    def write_json(self, name: str, value: Any) -> None:
        if self.world.is_main:
            self._check()
            write_atomic(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def log(self, **record: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.world.is_main:
            self._check()
            try:
                with self.metrics_path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise TrainingError(
                    f"{self.metrics_path}: cannot be written ({error.strerror}); mend that and start again: "
                    "the run resumes from its newest checkpoint"
                ) from error
            if self.on_line is not None:
                self.on_line(record)

    def _check(self) -> None:
        """A zombie writes nothing."""
        if self.fence is not None:
            self.fence.check()

    def log_evaluation(self, evaluation: Evaluation, **where: Any) -> None:
        """One line a protocol."""
        for name, result in evaluation.protocols.items():
            self.log(**where, protocol=name, accuracy=result.accuracy, correct=result.correct, total=result.total)

    def write_evaluation(self, evaluation: Evaluation, classes: list[str], facts: dict[str, Any]) -> None:
        if self.world.is_main:
            self._check()
            write_evaluation(self.path, evaluation, classes, facts)

    def cut_torn_line(self) -> None:
        """End metrics.jsonl at its last whole line: a kill may have cut the next one short.

        Lines after the step that the run resumes from stay: they are the evidence that training them again takes the
        same samples. A ``resume`` event says from which step on later lines count.
        """
        if self.world.is_main and self.metrics_path.exists():
            with self.metrics_path.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder, as nested mappings.

    Raises:
        OatError: not a run folder.
    """
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())
    except FileNotFoundError:
        raise OatError(f"{run}: not a run folder, config.yaml is missing; give the output_dir of a training") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OatError(f"{run / 'config.yaml'}: cannot be read ({error.__class__.__name__})") from error
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or not {"path", "eval_split"} <= data.keys():
        raise OatError(f"{run / 'config.yaml'}: damaged, it has no section data; give --data and --split")
    return values


def differing(before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """What makes `config` another run than the resolved configuration `before`: both values, by dotted key."""
    old = _pixels(flatten(dataclasses.asdict(Config())) | flatten(before))
    now = _pixels(flatten(dataclasses.asdict(config)))
    keys = sorted((now.keys() | old.keys()) - _MAY_CHANGE)
    return {key: (old.get(key), now.get(key)) for key in keys if old.get(key) != now.get(key)}


def _refused(text: str) -> CheckpointError:
    error = CheckpointError(text)
    error.permanent = True
    return error


def _pixels(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with what data.decoded_cache changes: nothing, but that crops are cut from whole images or not."""
    whole = values["data.crop"] == "random_resized_crop" and values["data.decoded_cache"] != "none"
    return values | {"data.decoded_cache": "ram or disk (crops are then cut from whole images)" if whole else "none"}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
