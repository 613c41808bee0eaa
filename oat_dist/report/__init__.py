"""The run report: one self-contained HTML file made from what a run folder holds, and the comparison of several runs.

`metrics` reads metrics.jsonl, `evaluation` and `predictions` the answers, `data` the whole run folder. `drawing`,
`figures` and `grid` draw, `pictures` reads images. `headline`, `curves`, `confusion`, `gallery`, `timing` and `card`
are the sections; `pairs`, `groups` and `overlay` what compares runs. `html` and `style` set the page; `page` says what
stands on that of one run, `compare` on that of several. None of it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from oat_dist.errors import ConfigError, OatError
from oat_dist.files import write_atomic
from oat_dist.report.compare import render_comparison
from oat_dist.report.data import Run, read_run
from oat_dist.report.page import render

__all__ = ["COMPARISON_NAME", "REPORT_NAME", "write_comparison", "write_report"]

REPORT_NAME = "report.html"
COMPARISON_NAME = "report-compare.html"
MOST_RUNS = 20


def write_report(
    run: Path, *, against: Path | None = None, output: Path | None = None, data: str | None = None
) -> Path:
    """Write the report of a run, `run/report.html` if no `output` is given, and return its path.

    The same files give the same bytes. A run in progress, or one without an evaluation, gets a report that
    says so. Images come out of the data set where its manifest can be read; else the report says why not.

    Args:
        against: the folder of another run, to compare the answers to the same samples with.
        data: where the data set lies, if not where the run's configuration says: the folder of a packed set or its URL.

    Raises:
        DataError: `run` or `against` is not a folder, or holds no metrics.jsonl.
        ConfigError: `against` is `run` itself.
        OatError: the report cannot be written.
    """
    shown, base = read_run(Path(run)), None
    if against is not None:
        if Path(against).resolve() == Path(run).resolve():
            raise ConfigError(f"--against {against}: is the run itself; name another one")
        shown, base = _named([Path(run), Path(against)], None)
    return _write(Path(run) / REPORT_NAME if output is None else output, render(shown, base, data))


def write_comparison(
    runs: Sequence[Path],
    output: Path = Path(COMPARISON_NAME),
    *,
    against: Path | None = None,
    labels: Sequence[str] | None = None,
    data: str | None = None,
) -> Path:
    """Write the comparison of runs and return its path.

    Args:
        against: the run that the others are tested against, one of `runs` or another; None: the first.
        labels: a name for each run, instead of that of its folder.

    Raises:
        DataError: a run that is not a folder, or holds no metrics.jsonl.
        ConfigError: too many runs, one of them twice, or labels that do not fit.
        OatError: the page cannot be written.
    """
    folders = [Path(run) for run in runs]
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("a run is given twice; name each run folder once")
    if labels is not None and len(labels) != len(folders):
        raise ConfigError(f"--labels has {len(labels)} names for {len(folders)} runs; give one for each, with commas")
    base = 0
    if against is not None and Path(against).resolve() in resolved:
        base = resolved.index(Path(against).resolve())
    elif against is not None:
        folders.insert(0, Path(against))
        labels = None if labels is None else [Path(against).resolve().name, *labels]
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs are too many to compare on one page; give at most {MOST_RUNS}")
    return _write(Path(output), render_comparison(_named(folders, labels), base, data))


def _named(folders: Sequence[Path], labels: Sequence[str] | None) -> list[Run]:
    """The runs, each with a name of its own: its label, or its folder with as many parents as that takes."""
    if labels is None:
        parts = [folder.resolve().parts for folder in folders]
        depth = next((d for d in range(1, 1 + max(map(len, parts))) if len({p[-d:] for p in parts}) == len(parts)), 1)
        labels = ["/".join(p[-depth:]) for p in parts]
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise ConfigError(f"--labels {','.join(labels)}: every run needs a name of its own")
    return [replace(read_run(folder), name=label) for folder, label in zip(folders, labels, strict=True)]


def _write(path: Path, page: str) -> Path:
    try:
        write_atomic(path, page.encode(errors="replace"))  # names may hold lone surrogates, which UTF-8 cannot
    except OSError as error:
        raise OatError(
            f"{os.fspath(path)}: cannot be written ({error.strerror}); choose another place with --output"
        ) from error
    return path
