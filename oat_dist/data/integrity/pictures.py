"""Two pictures of a split as PNG: how its images are spread over the classes, and a sheet of samples.

The same data gives the same bytes. Drawn under our own settings, whatever the user's matplotlibrc says.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from oat_dist.report.style import GRID, INK, MUTED, SERIES

__all__ = ["balance_png", "sheet_png"]

_SETTINGS = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
_BARS = 40  # classes that get a bar with their name each
_LOG_FROM = 30  # a spread beyond this factor gets a logarithmic axis
_NAMED = 3

_SHEET_WIDTH = 1500
_SMALL, _CELL_SMALL, _CELL = 96, 96, 168
_GAP, _MARGIN, _CAPTION, _TITLE = 10, 24, 22, 44
_TILE = "#eef0f3"


def balance_png(title: str, classes: Sequence[str], counts: Sequence[int]) -> bytes:
    """Images by class: a bar for each of a few classes, a curve over the ranks of many."""
    with matplotlib.style.context(["default", _SETTINGS]):
        height = 1.1 + 0.27 * len(classes) if len(classes) <= _BARS else 4.2
        figure = Figure(figsize=(8, max(1.9, height)), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.set_title(title, pad=10)
        order = sorted(range(len(classes)), key=lambda k: (-counts[k], k))
        values = [counts[k] for k in order]
        names = [classes[k] for k in order]
        if len(classes) <= _BARS:
            _draw_bars(axes, names, values)
        else:
            _draw_ranks(axes, names, values)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing"
            )  # of a script the font lacks: a box stands there
            figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[int]) -> None:
    rows = range(len(names))
    axes.barh(rows, values, height=0.72, color=SERIES[0])
    axes.set_yticks(rows, [_shorten(name, 32) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(1, *values) * 1.12)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("images")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{value:,}",
            (value, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )


def _draw_ranks(axes: Axes, names: Sequence[str], values: Sequence[int]) -> None:
    """Sorted counts as an area; the ends by name."""
    least = min((value for value in values if value), default=1)
    logarithmic = max(values) > _LOG_FROM * least
    edges = np.arange(len(values) + 1) + 0.5
    axes.stairs(values, edges, fill=True, color=SERIES[0])
    median = sorted(values)[(len(values) - 1) // 2]
    axes.axhline(median, color=SERIES[1], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"median {median:,}",
        (1, median),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=SERIES[1],
    )
    axes.set_xlim(0.5, len(values) + 0.5)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(least * 0.7, max(values) * 1.6)
    else:
        axes.set_ylim(0, max(1, *values) * 1.15)
    axes.grid(axis="y")
    axes.set_ylabel("images" + (" (logarithmic)" if logarithmic else ""))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    there = [f"{_shorten(name, 20)} ({value:,})" for name, value in zip(names, values, strict=True) if value]
    empty = values.count(0)
    lines = [
        f"{len(values):,} classes, largest first" + (f"; {empty:,} without any image" if empty else ""),
        f"largest: {', '.join(there[:_NAMED])}",
        f"smallest: {', '.join(there[-_NAMED:])}",
    ]
    axes.set_xlabel("\n".join(lines), loc="left", fontsize=9, linespacing=1.5)


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _shorten(name: str, longest: int) -> str:
    """Both ends of a name that is too long: classes often differ in the last letters."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half].rstrip()}...{name[-half:].lstrip()}"


def sheet_png(title: str, images: Sequence[np.ndarray | None], captions: Sequence[str]) -> bytes:
    """Images in rows, each with its caption below; those of one caption side by side, None as an empty tile.

    Small images are enlarged by a whole factor without smoothing, large ones shrunk.
    """
    longest = [max(image.shape[:2]) for image in images if image is not None]
    cell = _CELL_SMALL if longest and float(np.median(longest)) <= _SMALL else _CELL
    columns = max(1, (_SHEET_WIDTH - 2 * _MARGIN + _GAP) // (cell + _GAP))
    places, columns, rows = _places(captions, columns)
    small, large = _font(13), _font(18)
    width = max(2 * _MARGIN + columns * (cell + _GAP) - _GAP, 2 * _MARGIN + round(large.getlength(title)))
    sheet = Image.new("RGB", (width, _MARGIN + _TITLE + rows * (cell + _CAPTION + _GAP) + _MARGIN - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, INK, large)
    for image, caption, (row, column) in zip(images, captions, places, strict=True):
        left, top = _MARGIN + column * (cell + _GAP), _MARGIN + _TITLE + row * (cell + _CAPTION + _GAP)
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), _TILE)
        if image is None:
            draw.text((left + cell / 2, top + cell / 2), "unreadable", MUTED, small, anchor="mm")
        else:
            picture = _fitted(image, cell)
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
        draw.text((left, top + cell + 4), _fitting(caption, small, cell), INK, small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _places(captions: Sequence[str], columns: int) -> tuple[list[tuple[int, int]], int, int]:
    """(row, column) of each image, and how many columns and rows there are; no class is broken where it need not be."""
    group = max(map(len, _runs(captions)), default=1)
    rows_each = -(-group // columns)  # a large class takes several rows, about equally long
    columns = -(-group // rows_each) if rows_each > 1 else min(len(captions), columns // group * group)
    places: list[tuple[int, int]] = []
    row, column = 0, 0
    for run in _runs(captions):
        if column and column + len(run) > columns:
            row, column = row + 1, 0
        for _ in run:
            if column == columns:
                row, column = row + 1, 0
            places.append((row, column))
            column += 1
    return places, columns, row + 1


def _runs(captions: Sequence[str]) -> list[list[str]]:
    return [list(run) for _, run in itertools.groupby(captions)]


def _fitted(image_HWC: np.ndarray, cell: int) -> Image.Image:
    picture = Image.fromarray(image_HWC)
    factor = cell // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = cell / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own font file: it is there wherever matplotlib is, and knows many scripts."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
