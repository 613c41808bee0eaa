"""How figures are drawn: one look for all of them, the smoothing of curves, and matplotlib's SVG made fit for the page.

Drawn without pyplot (no global state) and under our own settings, whatever the user's matplotlibrc says. Text
stays text, colours become the page's CSS variables, ids are kept apart between figures; the same data gives
the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from oat_dist.report.html import Html, escape, join, tag
from oat_dist.report.metrics import phase_name
from oat_dist.report.style import COLOURS, GRID, INK, MUTED, SERIES

__all__ = [
    "ACCURACY_PART",
    "WIDTH",
    "Look",
    "drawing",
    "key",
    "label_steps",
    "mark_switches",
    "numbered_look",
    "plain",
    "protocol_look",
    "smooth",
    "thin",
    "to_svg",
]

WIDTH = 4.6  # inches: two figures stand side by side on a screen, one fills a phone
ACCURACY_PART = 10  # accuracies, one an epoch, are smoothed over a tenth of the curve: as strongly as the paper's
_MAX_POINTS = 800  # drawn per curve; the extremes of every bin survive

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

_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Look:
    """Of a curve: matplotlib's colour, line style and marker. Line and marker tell it apart without colour."""

    colour: str
    line: str
    marker: str


_PROTOCOLS = {
    "argmax": Look(SERIES[0], "-", "o"),
    "batch": Look(SERIES[1], "-", "s"),
    "single": Look(SERIES[2], "--", "^"),
    "dataset": Look(SERIES[3], "-.", "D"),
    "stored": Look(SERIES[4], ":", "v"),
    "ordinary": Look(SERIES[2], "-.", "<"),
    "balanced": Look(SERIES[0], "--", "P"),
    "given": Look(SERIES[1], "-.", "X"),
}


def numbered_look(number: int) -> Look:
    """The look of the curve with this number, from 0; 140 of them differ."""
    return Look(SERIES[number % len(SERIES)], _LINES[number % len(_LINES)], _MARKERS[number % len(_MARKERS)])


def protocol_look(protocol: str) -> Look:
    """The same look for a protocol in every figure."""
    return _PROTOCOLS.get(protocol, Look(SERIES[2], ":", "X"))


def smooth(values: Sequence[float], part: int = 40, points: int = 0, *, ends: bool = True) -> tuple[np.ndarray, int]:
    """Centred running mean over about a `part`-th of a curve of so many `points`, and its window (1: none).

    `values` may be a piece of the curve; with points=0 they are all of it. The window, always odd, is
    1 + 2 * (points // (2 * part)), but no longer than the values. Towards the start it shrinks, on both sides alike: a
    steep start stays where it is. Towards the end the mean runs over the part of the window that exists. Where another
    piece follows (`ends` is false), it shrinks there too.
    """
    array = np.asarray(values, dtype=np.float64)
    half = min((points or len(array)) // (2 * part), (len(array) - 1) // 2)
    if half < 1:
        return array, 1
    start = [array[: 2 * i + 1].mean() for i in range(half)]
    last = len(array) - 1
    end = [array[i - (half if ends else last - i) :].mean() for i in range(len(array) - half, len(array))]
    window = 1 + 2 * half
    return np.concatenate([start, np.convolve(array, np.full(window, 1 / window), "valid"), end]), window


def thin(steps: Sequence[float], values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points: of every bin the lowest and the highest, in their order."""
    x, y = np.asarray(steps), np.asarray(values, dtype=np.float64)
    if len(y) <= _MAX_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(y)), _MAX_POINTS // 2)
    kept = np.unique([b[i] for b in bins for i in (y[b].argmin(), y[b].argmax())])
    return x[kept], y[kept]


def mark_switches(axes: Axes, switches: Sequence[tuple[int, str]]) -> None:
    """A dashed line where a phase begins, labelled on the side that has more room; the curves leave it some height."""
    if any(phase for _, phase in switches):
        (low, high), scale = axes.get_ylim(), axes.get_yscale()
        axes.set_ylim(low, high * (high / low) ** 0.12 if scale == "log" else high + 0.12 * (high - low))
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


def label_steps(figure: Figure) -> None:
    """Whole steps along every x axis, named below the last one."""
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    figure.axes[-1].set_xlabel("step")


def plain(value: float, _: int | None = None) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.6g}"


@contextmanager
def drawing(name: str) -> Iterator[str]:
    """Our settings only, and ids that depend on nothing but the figure's name and content."""
    settings = matplotlib.style.context(["default", {**_SETTINGS, "svg.hashsalt": name}])
    with settings, np.errstate(over="ignore"):  # of a run that diverged, ticks beyond what a float holds
        yield name


def arrange(figure: Figure) -> None:
    """Place the axes of a figure one below the other, as high as each other, with room for what stands around them.

    Counted in letters instead of measured as matplotlib's layout engines do, which takes as long as drawing.
    """
    width, height = (72 * inches for inches in figure.get_size_inches())
    above = [20.0 if axes.get_title(loc="left") else 8.0 for axes in figure.axes]
    below = [34.0 if axes.get_xlabel() else 19.0 for axes in figure.axes]
    each = (height - sum(above) - sum(below)) / len(figure.axes)

    def place(left: float) -> None:
        top = height
        for axes, over, under in zip(figure.axes, above, below, strict=True):
            top -= over + each
            axes.set_position((left / width, top / height, (width - left - 15) / width, each / height))
            top -= under

    place(50.0)  # the height decides how many ticks there are, and they what room they take
    place(max(_room(axes) for axes in figure.axes))


def _room(axes: Axes) -> float:
    """Points that the labels to the left of some axes take."""
    low, high = sorted(axes.get_ylim())
    ticks = [tick for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    longest = max((sum(3.3 if letter in ",." else 6.5 for letter in label) for label in labels), default=0.0)
    return 14.0 + longest + (17.0 if axes.get_ylabel() else 0.0)


def to_svg(figure: Figure, name: str, description: str) -> Html:
    """The figure as an <svg> element for the page: fluid, described, in the page's font and colours."""
    arrange(figure)
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
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{escape(description)}">'
    return Html(opening + svg[svg.index(">") + 1 :])


_DASHES = {"-": "", "--": "6 3", "-.": "9 2.5 1.6 2.5", ":": "1.6 2.6"}
_SHAPES = {
    "o": '<circle cx="17" cy="6" r="3.2"/>',
    "s": '<path d="M14 3h6v6h-6z"/>',
    "^": '<path d="M17 2l3.6 7h-7.2z"/>',
    "<": '<path d="M13 6l7-3.6v7.2z"/>',
    "D": '<path d="M17 2l4 4l-4 4l-4-4z"/>',
    "v": '<path d="M17 10l3.6-7h-7.2z"/>',
    "P": '<path d="M15.6 2.4h2.8v2.2h2.2v2.8h-2.2v2.2h-2.8v-2.2h-2.2v-2.8h2.2z"/>',
    "X": '<path d="M13.5 2.5l7 7m0-7l-7 7"/>',
}


def key(entries: Sequence[tuple[Look, str]]) -> Html:
    """What the curves are called, as a list of the page: long names wrap, and every script has its letters."""
    names = {light: f"var(--{variable})" for variable, (light, _) in COLOURS.items()}
    items = []
    for look, label in entries:
        colour, dashes = names[look.colour], _DASHES[look.line]
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        sample = (
            f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true" fill="none" stroke="{colour}" '
            f'stroke-width="1.8"><path d="M0 6h34"{dashed}/><g fill="var(--card)">{_SHAPES[look.marker]}</g></svg>'
        )
        items.append(tag("li", join([Html(sample), tag("span", label)], "")))
    return tag("ul", join(items), class_="key")
