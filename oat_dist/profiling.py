"""A trace of chosen steps: which kernels ran when, and what waited for what. Costs nothing while it is off.

The trace opens in Perfetto (ui.perfetto.dev) or chrome://tracing; ``ProfilerStep#n`` is global step n, and within it
the ranges that `span` names. Nothing that is measured changes a number of the training.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from oat_dist.distributed import World
from oat_dist.errors import ConfigError

__all__ = ["StepProfiler", "parse_steps", "span"]

_MOST_STEPS = 100  # a trace of more fills the memory, and no browser opens it
_TOP_ROWS = 30

_recording = False
_nothing: AbstractContextManager[None] = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A named range of the trace, while one is recorded."""
    return record_function(name) if _recording else _nothing


def parse_steps(text: str) -> range:
    """``"10-15"`` or ``"10"`` as steps, counted from 1.

    Raises:
        ConfigError: neither, or too many of them.
    """
    match = re.fullmatch(r"\s*(\d{1,15})\s*(?:-\s*(\d{1,15})\s*)?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"log.profile_steps must be the first and the last step to profile, from 1, such as 10-15, not {text!r}"
        )
    if last - first >= _MOST_STEPS:
        raise ConfigError(
            f"log.profile_steps={text} are {last - first + 1:,} steps; profile {_MOST_STEPS} at most, a trace of more "
            "fills the memory"
        )
    return range(first, last + 1)


class StepProfiler:
    """Records some steps of a run and writes ``<folder>/rank<r>-steps-<first>-<last>.json`` and a table beside it.

    Args:
        steps: to record, empty for none; what remains of them where a run resumes in their midst.
        folder: for the files, made when needed.
        world: whose rank this is.
        say: told in one line where rank 0's files are, or why a rank has none: that stops no training.
    """

    def __init__(self, steps: range, folder: Path, world: World, say: Callable[[str], None]) -> None:
        self.steps, self.folder, self.world = steps, folder, world
        self._say = say
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._first = self._last = 0

    def resume(self, step: int) -> None:
        """The run goes on after `step`."""
        if self.steps and step >= self.steps[-1]:
            self._say(
                f"note: steps {self.steps[0]:,} to {self.steps[-1]:,} (log.profile_steps) were taken before this start"
            )

    def begin(self, step: int) -> None:
        """Step `step` is about to be taken."""
        if self.steps and step == self.steps.start - 1:  # the tracer takes its time to start: not in a measured step
            self._prepare()
        elif step in self.steps:
            self._record(step)

    def end(self, step: int) -> float:
        """Step `step` has been taken. Returns the seconds that writing took, where it was the last one."""
        if self._step is None:
            return 0.0
        self._leave_step()
        self._last = step
        if step < self.steps[-1]:
            return 0.0
        started = time.perf_counter()
        self.close()
        return time.perf_counter() - started

    def close(self) -> None:
        """Stop recording, if that is under way, and write what there is."""
        global _recording
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        if not _recording:  # prepared only
            recorded.start_trace()
        self._leave_step()
        recorded.stop_trace()
        if _recording:
            _recording = False
            self._write(recorded)

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _prepare(self) -> None:
        # Kineto, the tracer, reports its own doings and a missing GPU as errors; what fails is said by us.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # acc_events: without it PyTorch 2.11 warns that other cycles are lost; there is one.
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.prepare_trace()

    def _record(self, step: int) -> None:
        global _recording
        if self._profile is None:
            self._prepare()
        if not _recording:
            assert self._profile is not None
            self._profile.start_trace()
            self._first = self._last = step
            _recording = True
        self._step = record_function(f"ProfilerStep#{step}")
        self._step.__enter__()

    def _write(self, recorded: profile) -> None:
        path = self.folder / f"rank{self.world.rank}-steps-{self._first}-{self._last}.json"
        part = path.with_suffix(".part.json")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.touch()
            recorded.export_chrome_trace(str(part))
            if not _whole(part):  # the tracer says so in its own log only
                raise OSError(0, "it was cut short, is the disk full?")
            part.replace(path)
            order = "self_cpu_time_total" if self.world.device.type == "cpu" else "self_device_time_total"
            table = recorded.key_averages().table(sort_by=order, row_limit=_TOP_ROWS, max_name_column_width=60)
            path.with_suffix(".txt").write_text(f"{table}\n")
        except OSError as error:
            for rest in (part, Path(f"{part}.tmp")):  # a full disk: the training needs the room
                with contextlib.suppress(OSError):
                    rest.unlink()
            self._say(f"warning: {path}: the profile cannot be written ({error.strerror}); the training goes on")
            return
        if self.world.is_main:
            self._say(f"profile of steps {self._first:,} to {self._last:,}: {path}")


def _whole(trace: Path) -> bool:
    """Whether a JSON file has its end."""
    with trace.open("rb") as file:
        file.seek(max(trace.stat().st_size - 64, 0))
        return file.read().rstrip().endswith(b"}")
