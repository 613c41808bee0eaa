"""The run report: one self-contained HTML file made from what a run folder holds.

`metrics` reads metrics.jsonl, `data` the whole run folder, `figures` draws, `curves` captions the drawings,
`html` and `style` set the page, `page` says what stands on it.
"""

from __future__ import annotations

from pathlib import Path

from oat_dist.files import write_atomic
from oat_dist.report.data import read_run
from oat_dist.report.page import render

__all__ = ["REPORT_NAME", "write_report"]

REPORT_NAME = "report.html"


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the files of the run folder and return its path.

    The same files give the same bytes. A run in progress, or one without an evaluation, gets a report that
    says so.

    Raises:
        DataError: `run` is not a folder, or holds no metrics.jsonl.
    """
    path = Path(run) / REPORT_NAME
    page = render(read_run(Path(run)))
    write_atomic(path, page.encode(errors="replace"))  # names may hold lone surrogates, which UTF-8 cannot
    return path
