"""The curves: accuracy, loss and other logged numbers as inline SVG, and one PNG for a README."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from oat_dist.errors import DataError
from oat_dist.files import write_atomic
from oat_dist.report.drawing import (
    ACCURACY_PART,
    WIDTH,
    Look,
    drawing,
    label_steps,
    mark_switches,
    numbered_look,
    plain,
    protocol_look,
    smooth,
    thin,
    to_svg,
)
from oat_dist.report.html import Html
from oat_dist.report.metrics import METRICS_NAME, Metrics, phase_name, read_metrics
from oat_dist.report.style import SERIES

__all__ = [
    "Curve",
    "Panel",
    "accuracy_png",
    "accuracy_svg",
    "epochs_svg",
    "last_phase_epoch",
    "loss_pieces",
    "loss_svg",
    "protocol_curve",
    "steps_svg",
]

_FEW = 30  # points of a curve of steps up to which each has a dot
_LOG_FROM = 30.0  # a positive curve that spans more than this factor gets a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """One line: `pieces` of x and y, each smoothed by itself over a `part`-th of the curve; `lights` are drawn lightly.

    `points` is the length that the part is of, if not that of all pieces: curves to be compared are smoothed alike.
    Where nothing is smoothed and there are no `lights`, the pieces are drawn as they are, with markers.
    """

    look: Look
    label: str
    pieces: Sequence[tuple[Sequence[float], Sequence[float]]]
    lights: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    part: int = ACCURACY_PART
    points: int = 0

    @property
    def window(self) -> int:
        """The widest window a piece is smoothed over; 1: none."""
        return max((window for _, window in self.smoothed()), default=1)

    def smoothed(self) -> list[tuple[np.ndarray, int]]:
        """The running mean of each piece, and its window."""
        points = self.points or sum(len(y) for _, y in self.pieces)
        return [
            smooth(y, self.part, points, ends=piece == len(self.pieces)) for piece, (_, y) in enumerate(self.pieces, 1)
        ]


@dataclass(frozen=True)
class Panel:
    """One pair of axes over the steps: `series` maps a legend text to the name of a logged number.

    `percent` shows shares of 1 as percentages from zero; `exact` draws a set value as it is, not smoothed.
    """

    title: str
    series: Mapping[str, str]
    percent: bool = False
    exact: bool = False


def accuracy_svg(
    curves: Sequence[Curve],
    description: str,
    *,
    since: int = 0,
    switches: Sequence[tuple[int, str]] = (),
    name: str = "accuracy",
) -> Html:
    """Accuracies (0..1) over finished epochs, one line a curve; below, the epochs from `since` on closer."""
    with drawing(name):
        figure = Figure(figsize=(WIDTH, 5.4 if since else 3.4))
        axes = figure.add_subplot(2 if since else 1, 1, 1)
        _draw_accuracy(axes, curves)
        mark_switches(axes, switches)
        if since:
            axes.set_xlabel("")
            _draw_accuracy(figure.add_subplot(2, 1, 2), curves, since)
        return to_svg(figure, name, description)


def epochs_svg(curves: Sequence[Curve], description: str, *, name: str, label: str) -> Html:
    """Other numbers over finished epochs."""
    with drawing(name):
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.add_subplot(1, 1, 1)
        for curve in curves:
            _draw_curve(axes, curve)
        axes.set_xlabel("finished epochs")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, name, description)


def loss_svg(
    panels: Mapping[str, Sequence[Curve]],
    description: str,
    *,
    switches: Sequence[tuple[int, str]] = (),
    name: str = "loss",
) -> Html:
    """Losses over the steps, a panel for each phase: the phases' losses have different scales."""
    with drawing(name):
        figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * len(panels)))
        for row, (title, curves) in enumerate(panels.items()):
            axes = figure.add_subplot(len(panels), 1, row + 1)
            for curve in curves:
                _draw_curve(axes, curve, marker=".")
            values = [y for curve in curves for _, ys in curve.pieces for y in ys]
            _scale(axes, values)
            axes.set_title(title)
            low, high = axes.get_xlim()
            mark_switches(axes, [(step, phase) for step, phase in switches if low <= step <= high])
        label_steps(figure)
        return to_svg(figure, name, description)


def steps_svg(name: str, metrics: Metrics, panels: Sequence[Panel], description: str) -> Html:
    """Panels of other numbers over the steps, one below the other."""
    with drawing(name):
        figure = Figure(figsize=(WIDTH, 0.6 + 1.8 * len(panels)))
        for row, panel in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, row + 1)
            axes.set_title(panel.title)
            drawn: list[float] = []
            for number, (label, logged) in enumerate(panel.series.items()):
                steps, values = metrics.series(logged)
                scaled = [100 * value for value in values] if panel.percent else values
                look = Look(SERIES[number], ("-", "--")[number % 2], "o")
                if panel.exact:
                    axes.plot(*thin(steps, scaled), color=look.colour, label=label)
                else:
                    _draw_curve(axes, Curve(look, label, [(steps, scaled)], part=40), marker=".")
                drawn += scaled
            if panel.percent or panel.exact:
                axes.set_ylim(0, max([1.0 if panel.percent else 0.0, *drawn]) * 1.08 or None)
            else:
                _scale(axes, drawn)
            axes.yaxis.set_major_formatter(FuncFormatter(plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(_nothing))
            if len(panel.series) > 1:
                axes.legend(loc="best")
            mark_switches(axes, [(s.step, s.phase if row == 0 else "") for s in metrics.switches])
        label_steps(figure)
        return to_svg(figure, name, description)


def accuracy_png(runs: dict[str, Path], output: Path) -> None:
    """Draw validation accuracy over epochs of one or several run folders into a PNG 1,000 pixels wide.

    Beside the whole training stands the last phase alone, where there are two.
    `runs` maps the label of a run to its folder. Colour tells the runs apart, line and marker the protocols;
    the switch of phases is marked for a single run.

    Raises:
        DataError: a folder without metrics.jsonl, or no validation in any of the runs.
    """
    logs = {label: read_metrics(folder / METRICS_NAME) for label, folder in runs.items()}
    if not any(log.validation for log in logs.values()):
        folders = ", ".join(str(folder) for folder in runs.values())
        raise DataError(f"{folders}: no validation logged yet, so there is nothing to draw; let a run finish an epoch")
    curves = [
        protocol_curve(log, protocol, f"{label}: {protocol}", number)
        if len(logs) > 1
        else protocol_curve(log, protocol)
        for number, (label, log) in enumerate(logs.items())
        for protocol in log.protocols
    ]
    with drawing("accuracy-png"):
        since = last_phase_epoch(logs.values())
        figure = Figure(figsize=(1000 / 150, 4.0), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot(1, 2 if since else 1, 1)
        _draw_accuracy(axes, curves)
        if len(logs) == 1:
            ((label, log),) = logs.items()
            axes.set_title(label)
            mark_switches(axes, [(s.epoch, s.phase) for s in log.switches])
        labels = axes.get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=4 if len(labels[0]) > 6 else 3, fontsize=8.5)
        if since:
            _draw_accuracy(figure.add_subplot(1, 2, 2), curves, since)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    write_atomic(output, small.getvalue())


def last_phase_epoch(runs: Iterable[Metrics]) -> int:
    """The earliest epoch at which a run was validated in its last phase; 0 where that is all or one epoch."""
    found = []
    for metrics in runs:
        last = [row for row in metrics.validation if row.phase == metrics.validation[-1].phase]
        if len(last) < len(metrics.validation) and last[0].epoch < last[-1].epoch:
            found.append(last[0].epoch)
    return min(found, default=0)


def protocol_curve(metrics: Metrics, protocol: str, label: str = "", number: int | None = None) -> Curve:
    """A run's accuracy under one protocol; `number`, that of the run, sets the colour where there are several runs."""
    rows = metrics.of_protocol(protocol)
    look = protocol_look(protocol)
    if number is not None:
        look = Look(numbered_look(number).colour, look.line, look.marker)
    piece = [row.epoch for row in rows], [row.accuracy for row in rows]
    return Curve(look, label or protocol, [piece], points=len({row.epoch for row in metrics.validation}))


def _draw_accuracy(axes: Axes, curves: Sequence[Curve], since: int = 0) -> None:
    """One line for each curve, from epoch `since` on: smoothed over all of it, then cut."""
    if since:
        axes.set_title(f"from epoch {since} on")
    for curve in curves:
        percent = Curve(
            curve.look,
            curve.label,
            [(x, [100 * value for value in y]) for x, y in curve.pieces],
            [(x, [100 * value for value in y]) for x, y in curve.lights],
            curve.part,
            curve.points,
        )
        _draw_curve(axes, percent, since=since)
    axes.set_xlabel("finished epochs")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def _draw_curve(axes: Axes, curve: Curve, *, since: int = 0, marker: str = "") -> None:
    """The raw values lightly and their running mean over them; what is not smoothed as it is, with markers.

    `marker` takes the place of that of the curve, where there is no running mean.
    """
    lights = list(curve.lights) or ([*curve.pieces] if curve.window > 1 else [])
    xs: list[float] = []
    ys: list[float] = []
    for (x, _), (mean, _) in zip(curve.pieces, curve.smoothed(), strict=True):
        xs += x
        ys += mean.tolist()
    colour = curve.look.colour
    for x, y in lights:
        axes.plot(*thin(*_since(x, y, since)), color=colour, alpha=0.3, linewidth=0.9)
    xs, ys = _since(xs, ys, since)
    if not ys:  # a phase that never had a finite loss keeps its empty axes
        return
    marked = curve.look.marker if not marker else ("" if lights or len(ys) > _FEW else marker)
    (line,) = axes.plot(*thin(xs, ys), color=colour, label=curve.label, linestyle=curve.look.line, marker=marked)
    if marker:
        line.set_markersize(3.5)
    else:
        line.set_markerfacecolor("none")
        line.set_markevery(max(1, len(ys) // 12))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def _since(x: Sequence[float], y: Sequence[float], since: int) -> tuple[list[float], list[float]]:
    kept = [(a, b) for a, b in zip(x, y, strict=True) if a >= since]
    return [a for a, _ in kept], [b for _, b in kept]


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_nothing))


def _nothing(value: float, _: int | None = None) -> str:
    return ""


def loss_pieces(metrics: Metrics) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses by the name of the phase, in the order of the phases."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in metrics.training:
        steps, losses = found.setdefault(phase_name(row.phase), ([], []))
        if "loss" in row.values:
            steps.append(row.step)
            losses.append(row.values["loss"])
    return found
