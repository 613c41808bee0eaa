"""Hands the runs of a plan to Slurm: lists of overrides for ``launch/slurm/sweep.sbatch``, an array job for each.

What others start from goes first; its children wait for it (``--dependency=afterok``).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from oat_dist.errors import ConfigError, OatError
from oat_dist.experiments.plan import PlannedRun
from oat_dist.files import sha256_bytes, write_atomic

__all__ = ["submit"]

SCRIPT = Path("launch/slurm/sweep.sbatch")


def submit(runs: Sequence[PlannedRun], folder: Path, options: Sequence[str], dry_run: bool) -> None:
    """Write the lists into `folder` and submit them, saying what is done; with `dry_run` only say it.

    Args:
        runs: those that are not trained.
        options: further ones of sbatch.

    Raises:
        ConfigError: not in the top folder of the repository, where the script belongs.
        OatError: sbatch refuses, or is not there.
    """
    if not SCRIPT.is_file():
        raise ConfigError(f"--slurm submits {SCRIPT}, which is not here; start it in the top folder of oat_dist")
    missing = {run.folder for run in runs}
    first = [run for run in runs if run.parent is None or run.parent.folder not in missing]
    jobs: list[str] = []
    for stage in (first, [run for run in runs if run not in first]):
        after = [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []
        begun: list[str] = []
        for config in dict.fromkeys(run.config_path for run in stage):
            lines = [f"{shlex.join(run.overrides)}\n" for run in stage if run.config_path == config]
            text = "".join(lines)
            # Named by its content: a list that jobs still read is never another one.
            path = folder / f"{config.stem}-{sha256_bytes(text.encode())[:8]}.txt"
            array = [f"--array=1-{len(lines)}", *after, *options]
            command = ["sbatch", "--parsable", *array, str(SCRIPT), str(path), str(config)]
            print(shlex.join(command))
            if dry_run:
                print(text, end="")
                begun.append(f"JOB{len(jobs) + len(begun) + 1}")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, text)
                begun.append(_sbatch(command))
                print(f"submitted job {begun[-1]}: {len(lines)} run(s)")
        jobs += begun


def _sbatch(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise OatError("sbatch is not installed here; submit on a login node of the cluster") from None
    if done.returncode:
        raise OatError(f"sbatch: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
