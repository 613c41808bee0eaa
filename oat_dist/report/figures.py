"""The curves: inline SVG for the report, one PNG for a README.

Drawn without pyplot (no global state) and under our own settings, whatever the user's matplotlibrc says. Text
stays text, colours become the page's CSS variables, ids are kept apart between figures; the same data gives
the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from oat_dist.errors import DataError
from oat_dist.files import write_atomic
from oat_dist.report.html import Html
from oat_dist.report.metrics import METRICS_NAME, Metrics, phase_name, read_metrics
from oat_dist.report.style import COLOURS, GRID, INK, MUTED, SERIES

__all__ = ["Panel", "accuracy_png", "accuracy_svg", "loss_svg", "smooth", "steps_svg"]

_WIDTH = 5.0  # inches: two figures stand side by side on a screen, one fills a phone
_MAX_POINTS = 800  # drawn per curve; the extremes of every bin survive
_LOG_FROM = 30.0  # a positive curve that spans more than this factor gets a logarithmic axis

# Told apart without colour: a dash pattern and a marker for each protocol.
_LOOKS = {
    "argmax": ("-", "o"),
    "batch": ("-", "s"),
    "single": ("--", "^"),
    "dataset": ("-.", "D"),
    "stored": (":", "v"),
}
_OTHER_LOOK = ((0, (5, 1, 1, 1, 1, 1)), "x")

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes over the steps: `series` maps a legend text to the name of a logged number.

    `percent` shows shares of 1 as percentages from zero; `exact` draws a set value as it is, not smoothed.
    """

    title: str
    series: Mapping[str, str]
    percent: bool = False
    exact: bool = False


def smooth(values: Sequence[float]) -> tuple[np.ndarray, int]:
    """Centred running mean over about a fortieth of the curve, and its window (1: too short to smooth).

    Near the ends the mean runs over the part of the window that exists.
    """
    array = np.asarray(values, dtype=np.float64)
    window = 1 + 2 * (len(array) // 80)
    ones = np.ones(window)
    return np.convolve(array, ones, "same") / np.convolve(np.ones(len(array)), ones, "same"), window


def accuracy_svg(metrics: Metrics, description: str) -> Html:
    """Validation accuracy over finished epochs, one line a protocol; below, the last phase closer."""
    switches = [(s.epoch, s.phase) for s in metrics.switches]
    since = _last_phase_epoch([metrics])
    with _drawing("accuracy") as name:
        figure = Figure(figsize=(_WIDTH, 5.4 if since else 3.6), layout="constrained")
        axes = figure.add_subplot(2 if since else 1, 1, 1)
        _draw_accuracy(axes, {"": metrics})
        _mark_switches(axes, switches)
        if len(metrics.protocols) > 1:
            figure.legend(loc="outside lower center", ncols=3)
        if since:
            axes.set_xlabel("")
            axes = figure.add_subplot(2, 1, 2)
            _draw_accuracy(axes, {"": metrics}, since)
        return _to_svg(figure, name, description)


def loss_svg(metrics: Metrics, description: str) -> Html:
    """Training loss over the steps, a panel a phase: the phases' losses have different scales."""
    switches = metrics.switches
    starts = [0, *(switch.step for switch in switches)]
    ends = [*(switch.step for switch in switches), metrics.training[-1].step]
    phases = [metrics.training[0].phase, *(switch.phase for switch in switches)]
    with _drawing("loss") as name:
        figure = Figure(figsize=(_WIDTH, 0.6 + 2.2 * len(phases)), layout="constrained")
        for row, (phase, start, end) in enumerate(zip(phases, starts, ends, strict=True)):
            axes = figure.add_subplot(len(phases), 1, row + 1)
            # a switch known only from the last step before it belongs to the panel that it ends
            rows = [t for t in metrics.training if start <= t.step <= end and t.phase == phase and "loss" in t.values]
            _draw_curve(axes, [t.step for t in rows], [t.values["loss"] for t in rows], SERIES[row % len(SERIES)])
            axes.set_title(phase_name(phase))
            _mark_switches(axes, [(s.step, s.phase) for s in switches if s.step in (start, end)])
        _label_steps(figure)
        return _to_svg(figure, name, description)


def steps_svg(name: str, metrics: Metrics, panels: Sequence[Panel], description: str) -> Html:
    """Panels of other numbers over the steps, one below the other."""
    with _drawing(name):
        figure = Figure(figsize=(_WIDTH, 0.6 + 1.8 * len(panels)), layout="constrained")
        for row, panel in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, row + 1)
            axes.set_title(panel.title)
            drawn: list[float] = []
            for number, (label, key) in enumerate(panel.series.items()):
                steps, values = metrics.series(key)
                scaled = [100 * value for value in values] if panel.percent else values
                if panel.exact:
                    axes.plot(*_thin(steps, scaled), color=SERIES[number], label=label)
                else:
                    _draw_curve(axes, steps, scaled, SERIES[number], label=label, line=("-", "--")[number % 2])
                drawn += scaled
            if panel.percent or panel.exact:
                axes.set_ylim(0, max([1.0 if panel.percent else 0.0, *drawn]) * 1.08 or None)
            elif min(drawn) > 0 and max(drawn) / min(drawn) > _LOG_FROM:
                axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(_nothing))
            if len(panel.series) > 1:
                axes.legend(loc="best")
            _mark_switches(axes, [(s.step, s.phase if row == 0 else "") for s in metrics.switches])
        _label_steps(figure)
        return _to_svg(figure, name, description)


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
    with _drawing("accuracy-png"):
        since = _last_phase_epoch(logs.values())
        figure = Figure(figsize=(1000 / 150, 4.0), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot(1, 2 if since else 1, 1)
        named = logs if len(logs) > 1 else dict(zip([""], logs.values(), strict=True))
        _draw_accuracy(axes, named)
        if len(logs) == 1:
            ((label, log),) = logs.items()
            axes.set_title(label)
            _mark_switches(axes, [(s.epoch, s.phase) for s in log.switches])
        labels = axes.get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=4 if len(labels[0]) > 6 else 3, fontsize=8.5)
        if since:
            _draw_accuracy(figure.add_subplot(1, 2, 2), named, since)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    write_atomic(output, small.getvalue())


def _last_phase_epoch(runs: Iterable[Metrics]) -> int:
    """The earliest epoch at which a run was validated in its last phase; 0 where that is all or one epoch."""
    found = []
    for metrics in runs:
        last = [row for row in metrics.validation if row.phase == metrics.validation[-1].phase]
        if len(last) < len(metrics.validation) and last[0].epoch < last[-1].epoch:
            found.append(last[0].epoch)
    return min(found, default=0)


def _draw_accuracy(axes: Axes, runs: Mapping[str, Metrics], since: int = 0) -> None:
    """One line for each run and protocol, from epoch `since` on."""
    if since:
        axes.set_title(f"from epoch {since} on")
    for number, (label, metrics) in enumerate(runs.items()):
        for index, protocol in enumerate(metrics.protocols):
            rows = [row for row in metrics.of_protocol(protocol) if row.epoch >= since]
            line, marker = _LOOKS.get(protocol, _OTHER_LOOK)
            axes.plot(
                [row.epoch for row in rows],
                [100 * row.accuracy for row in rows],
                color=SERIES[(index if len(runs) == 1 else number) % len(SERIES)],
                linestyle=line,
                marker=marker,
                markerfacecolor="none",
                markevery=max(1, len(rows) // 12),
                label=f"{label}: {protocol}" if label else protocol,
            )
    axes.set_xlabel("finished epochs")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _draw_curve(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    *,
    label: str = "",
    line: str = "-",
) -> None:
    """The raw values lightly and their running mean over them; short curves as they are, with markers."""
    if not values:  # a phase that never had a finite loss keeps its empty axes
        return
    mean, window = smooth(values)
    if window > 1:
        axes.plot(*_thin(steps, values), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(*_thin(steps, mean), color=colour, label=label, linestyle=line)
    else:
        axes.plot(steps, values, color=colour, label=label, linestyle=line, marker=".")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _thin(steps: Sequence[int], values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points: of every bin the lowest and the highest, in their order."""
    x, y = np.asarray(steps), np.asarray(values, dtype=np.float64)
    if len(y) <= _MAX_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(y)), _MAX_POINTS // 2)
    kept = np.unique([b[i] for b in bins for i in (y[b].argmin(), y[b].argmax())])
    return x[kept], y[kept]


def _mark_switches(axes: Axes, switches: Sequence[tuple[int, str]]) -> None:
    """A dashed line where a phase begins, labelled on the side that has more room."""
    for position, phase in switches:
        axes.axvline(position, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
        if phase:
            low, high = axes.get_xlim()
            left = position > (low + high) / 2
            axes.annotate(
                f"switch to {phase_name(phase)}",
                (position, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if left else 4, -2),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                fontsize=9,
                color=MUTED,
            )


def _label_steps(figure: Figure) -> None:
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    figure.axes[-1].set_xlabel("step")


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _nothing(value: float, _: int | None = None) -> str:
    return ""


@contextmanager
def _drawing(name: str) -> Iterator[str]:
    """Our settings only, and ids that depend on nothing but the figure's name and content."""
    with matplotlib.style.context(["default", {**_SETTINGS, "svg.hashsalt": name}]):
        yield name


def _to_svg(figure: Figure, name: str, description: str) -> Html:
    """The figure as an <svg> element for the page: fluid, described, in the page's font and colours."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>\s*", "", svg, flags=re.DOTALL)  # a rule for "*": it would leak into the page
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # as matplotlib before 3.10 wrote it
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for variable, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{variable})")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{label}">'
    return Html(opening + svg[svg.index(">") + 1 :])
