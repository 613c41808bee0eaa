"""Accelerate's experiment trackers (its ``log_with``): which there are, and starting them for a run.

Accelerate leaves out silently what is not installed, or only warns. Here it is an error that says what to install.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
from accelerate.utils import ProjectConfiguration

from oat_dist.errors import ConfigError, LaunchError

__all__ = ["TRACKERS", "TrackedRun", "check_installed", "own_id", "parse_trackers", "start_trackers"]

TRACKERS = tuple(sorted(LOGGER_TYPE_TO_CLASS))
_ALWAYS_NEW = frozenset({"clearml", "comet_ml"})  # to them every start is a run of its own


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        project: under which they list it.
        name: of the run.
        run_id: 21 lowercase letters and digits that are this run's alone, the same at every start.
        known: trackers that have had this run before, with what they call it (`own_id`).
        folder: for what they write to the local disk.
        step: of the run, from which it goes on; 0 for a new one.
        settings: hyper-parameters by dotted name.
    """

    project: str
    name: str
    run_id: str
    known: Mapping[str, str]
    folder: Path
    step: int
    settings: Mapping[str, bool | int | float | str]


def parse_trackers(text: str) -> tuple[str, ...]:
    """``log.trackers``: names by spaces, ``all`` (those that are installed), or ``none``.

    Raises:
        ConfigError: another name; the nearest one is suggested.
    """
    names = tuple(dict.fromkeys(text.split()))
    if names in ((), ("none",)):
        return ()
    if names == ("all",):
        return tuple(name for name in TRACKERS if name in _installed()) or names
    for name in names:
        if name not in TRACKERS:
            close = difflib.get_close_matches(name, [*TRACKERS, "all", "none"], n=1)
            hint = f"; did you mean {close[0]}?" if close and close[0] != name else ""
            raise ConfigError(
                f"log.trackers must be none, all, or by spaces any of {', '.join(TRACKERS)}, not {text!r}{hint}"
            )
    return names


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers that this process could not start.

    Args:
        names: as `parse_trackers` gives them.

    Raises:
        ConfigError: a tracker's package is missing.
    """
    if "all" in names:
        raise ConfigError(
            f"log.trackers=all, but none of them is installed here; pip install one: {', '.join(TRACKERS)}"
        )
    missing = [name for name in names if name not in _installed()]
    if missing:
        what, them = ("it is", "it") if len(missing) == 1 else ("they are", "them")
        raise ConfigError(
            f"log.trackers={' '.join(names)}, but {what} not installed here: pip install {' '.join(missing)}, "
            f"or take {them} out of log.trackers"
        )


def start_trackers(accelerator: Accelerator, names: Sequence[str], run: TrackedRun) -> list[GeneralTracker]:
    """Start the trackers, on the main process only; a run that goes on continues in those that can do so.

    Raises:
        ConfigError: a tracker's package is missing.
        LaunchError: one does not start: no account, no server.
    """
    check_installed(names)
    run.folder.mkdir(parents=True, exist_ok=True)
    accelerator.project_configuration = ProjectConfiguration(str(run.folder.parent), logging_dir=str(run.folder))
    accelerator.log_with = filter_trackers(list(names), str(run.folder))
    try:
        accelerator.init_trackers(run.project, init_kwargs=_options(run))
        for tracker in accelerator.trackers:
            if tracker.name not in run.known or tracker.name in _ALWAYS_NEW:  # they may be given once
                tracker.store_init_configuration(dict(run.settings))
    except Exception as error:  # theirs to choose: each package has errors of its own
        what = " ".join(str(error).split()) or type(error).__name__
        raise LaunchError(
            f"log.trackers={' '.join(names)} cannot be started ({what}); mend that, or take it out of log.trackers"
        ) from error
    finally:
        started, accelerator.trackers = accelerator.trackers, []  # ours to finish: one that fails stops nothing
    return started


def own_id(tracker: GeneralTracker) -> str:
    """What a tracker itself calls the run that it has started; empty where it goes by our id, or by the folder."""
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.hash) if tracker.name == "aim" else ""


def _options(run: TrackedRun) -> dict[str, dict[str, Any]]:
    """What each tracker's own start takes: where to write, and how to go on with the same run."""
    known = run.known
    return {
        "tensorboard": {"purge_step": run.step + 1},  # what an earlier start wrote of steps that are trained again
        "wandb": {"name": run.name, "id": run.run_id, "resume": "allow", "dir": str(run.folder)},
        "swanlab": {"experiment_name": run.name, "id": run.run_id, "resume": "allow", "logdir": str(run.folder)},
        "trackio": {"name": f"{run.name}-{run.run_id[:6]}", "resume": "allow"},  # which knows runs by name alone
        "dvclive": {"dir": str(run.folder / "dvclive"), "resume": "dvclive" in known, "save_dvc_exp": False},
        "mlflow": {"run_id": known["mlflow"]} if "mlflow" in known else {"run_name": run.name},
        "aim": {"run_hash": known["aim"]} if "aim" in known else {},
        "clearml": {"task_name": run.name},
    }


def _installed() -> set[str]:
    return {str(name) for name in get_available_trackers()}
