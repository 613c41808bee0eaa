"""Accuracy over epochs, a figure for each cell and a line for each arm: the mean over seeds, raw and smoothed.

As the paper's figures 2 to 4. The band reaches from the lowest to the highest of the seeds, each smoothed by itself.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oat_dist.errors import DataError
from oat_dist.experiments.plan import Plan, PlannedRun
from oat_dist.report.drawing import ACCURACY_PART, WIDTH, drawing, numbered_look, smooth, to_svg
from oat_dist.report.html import Html
from oat_dist.report.metrics import METRICS_NAME, Validation, read_metrics

__all__ = ["Line", "figure_files", "files_of", "lines_of", "page_figure"]

_PNG_DPI = 150
_FEW = 20  # points of a line up to which it has dots


@dataclass(frozen=True)
class Line:
    """An arm. Epochs and accuracies (%) of each seed, by phase: no mean reaches over the switch."""

    label: str
    number: int
    seeds: list[dict[str, tuple[list[int], list[float]]]]

    @property
    def window(self) -> int:
        """The widest one that a phase is smoothed over; 1: none."""
        return max((window for _, _, _, window in self.smoothed()), default=1)

    def mean(self) -> dict[str, tuple[list[int], list[float]]]:
        """Over the seeds, by phase, where all of them have a value."""
        found = {}
        for phase in self.seeds[0]:
            of_seed = [dict(zip(*seed.get(phase, ([], [])), strict=True)) for seed in self.seeds]
            epochs = sorted(set.intersection(*(set(values) for values in of_seed)))
            found[phase] = (epochs, [statistics.fmean(values[epoch] for values in of_seed) for epoch in epochs])
        return found

    def smoothed(self) -> list[tuple[list[int], np.ndarray, list[np.ndarray], int]]:
        """Of each phase: epochs, the smoothed mean, that of each seed, and the window."""
        mean, found = self.mean(), []
        points = sum(len(epochs) for epochs, _ in mean.values())
        for phase, (epochs, values) in mean.items():
            ends = phase == list(mean)[-1]
            line, window = smooth(values, ACCURACY_PART, points, ends=ends)
            each = []
            for seed in self.seeds:
                of_seed = dict(zip(*seed[phase], strict=True))
                each.append(smooth([of_seed[epoch] for epoch in epochs], ACCURACY_PART, points, ends=ends)[0])
            found.append((epochs, line, each, window))
        return found


def lines_of(plan: Plan, cell: str, arms: Sequence[str]) -> list[Line]:
    """The lines of a cell, of the arms that have been evaluated while they were trained."""
    found = []
    for arm in arms:
        seeds = []
        for seed in plan.seeds:
            run = plan.runs.get((cell, arm, seed))
            pieces = {} if run is None else _pieces(run, plan.table.arms[arm].protocol)
            if pieces:
                seeds.append(pieces)
        if seeds:
            found.append(Line(plan.table.arms[arm].title, list(plan.table.arms).index(arm), seeds))
    return found


def _pieces(run: PlannedRun, protocol: str | None) -> dict[str, tuple[list[int], list[float]]]:
    """Epochs and accuracies by phase, those before the arms parted included."""
    rows: dict[int, Validation] = {}
    if not (run.folder / METRICS_NAME).exists():
        return {}
    for one in (run.parent, run):
        try:
            metrics = read_metrics(one.folder / METRICS_NAME) if one is not None else None
        except DataError:
            continue
        if metrics is None:
            continue
        for row in metrics.validation:
            own = "argmax" if "argmax" in metrics.protocols and row.phase == "cross_entropy" else protocol
            if row.protocol == (own or run.config.eval.protocol):
                rows[row.step] = row
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(rows):
        epochs, values = found.setdefault(rows[step].phase, ([], []))
        epochs.append(rows[step].epoch)
        values.append(100 * rows[step].accuracy)
    return found


def page_figure(lines: Sequence[Line], split: str, name: str) -> Html:
    """The figure for within a page."""
    with drawing(name):
        return to_svg(
            _draw(lines, split, Figure(figsize=(WIDTH, 3.6))), name, f"Line chart: accuracy on {split} over epochs"
        )


def figure_files(lines: Sequence[Line], split: str, name: str) -> dict[str, bytes]:
    """The figure as files: their contents by ``svg`` and ``png``."""
    with drawing(name):
        figure = _draw(lines, split, Figure(figsize=(1.5 * WIDTH, 4.2), layout="constrained", facecolor="white"))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return files_of(figure)


def files_of(figure: Figure) -> dict[str, bytes]:
    """A figure as files, the same bytes each time: their contents by ``svg`` and ``png``."""
    found: dict[str, bytes] = {}
    nothing: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    for kind, unsaid in (("svg", nothing), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=_PNG_DPI, metadata=unsaid)
        found[kind] = buffer.getvalue()
    return found


def _draw(lines: Sequence[Line], split: str, figure: Figure) -> Figure:
    axes = figure.add_subplot(1, 1, 1)
    for line in lines:
        look, few = numbered_look(line.number), sum(len(epochs) for epochs, _ in line.mean().values()) <= _FEW
        for number, ((epochs, mean, each, window), (_, raw)) in enumerate(
            zip(line.smoothed(), line.mean().values(), strict=True)
        ):
            if window > 1:
                axes.plot(epochs, raw, color=look.colour, alpha=0.35, linewidth=0.9)
            if len(each) > 1:
                stacked = np.stack(each)
                axes.fill_between(epochs, stacked.min(0), stacked.max(0), color=look.colour, alpha=0.15, linewidth=0)
            marker = look.marker if few else None
            label = line.label if number == 0 else None
            axes.plot(epochs, mean, color=look.colour, linestyle=look.line, marker=marker, label=label)
    axes.set_xlabel("finished epochs")
    axes.set_ylabel(f"accuracy on {split} (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
