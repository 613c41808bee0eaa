"""Heat maps: a table of numbers as shades, drawn by hand so that each shade is one path and follows the page's colours.

Told apart without colour: a shade is darker (in dark mode lighter) the larger its value.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from oat_dist.report.html import Html, escape, join, tag

__all__ = ["LEVELS", "grid_svg", "shade_key"]

LEVELS = 9
_NAMED = 40  # rows or columns up to which each is named
_RIGHT = 14.0  # room for half of the last column's number
_LETTERS = 18  # of a name


def grid_svg(
    levels_RC: np.ndarray,
    description: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    second: Callable[[int, int], bool] | None = None,
    width: float = 400.0,
    square: bool = True,
) -> Html:
    """Cells (R, C) of levels 0..LEVELS; 0 is left empty. Cells that `second` names have another colour.

    Args:
        rows, columns: names; of more than 40 only every tenth or so is written.
        width: of the drawing, in units of which its letters have 11.
        square: cells as high as wide; else the whole body is nearly square.
    """
    n_rows, n_columns = levels_RC.shape
    flat = max(map(len, _written(columns).values()), default=0) <= 3  # column names that need not be turned
    left = 16.0 + _margin(rows)
    bottom = 32.0 if flat else 16.0 + _margin(columns)
    wide = (width - left - _RIGHT) / n_columns
    high = wide if square else 0.9 * width / n_rows
    body_w, body_h = wide * n_columns, high * n_rows
    total_h = body_h + bottom + 4
    paths: dict[tuple[int, bool], list[str]] = {}
    for row, column in np.argwhere(levels_RC > 0).tolist():
        other = second is not None and second(row, column)
        x, y = left + column * wide, 2 + row * high
        paths.setdefault((int(levels_RC[row, column]), other), []).append(
            f"M{x:.6g} {y:.6g}h{wide:.5g}v{high:.5g}h{-wide:.5g}z"
        )
    parts = [
        Html(f'<rect x="{left:.6g}" y="2" width="{body_w:.6g}" height="{body_h:.6g}" class="field"/>'),
        *(
            Html(
                f'<path class="{"diagonal" if other else "shade"}" fill-opacity="{_opacity(level)}" d="{"".join(d)}"/>'
            )
            for (level, other), d in sorted(paths.items())
        ),
        *_names(rows, lambda i: (left - 5, 2 + (i + 0.5) * high), "end", 0),
        *_names(
            columns,
            lambda i: (left + (i + 0.5) * wide, body_h + (11 if flat else 8)),
            *(("middle", 0) if flat else ("end", -90)),
        ),
        _text(column_title, left + body_w / 2, total_h - 8, "middle", 0),
        _text(row_title, 10, 2 + body_h / 2, "middle", -90),
    ]
    label = escape(description)
    opening = f'<svg viewBox="0 0 {width:.6g} {total_h:.6g}" role="img" aria-label="{label}" class="grid">'
    return Html(f"{opening}\n{join(parts)}\n</svg>")


def shade_key(labels: Sequence[tuple[int, str]]) -> Html:
    """What the shades mean: (level, text)."""
    items = []
    for level, text in labels:
        swatch = (
            '<svg viewBox="0 0 18 12" width="18" height="12" aria-hidden="true"><path class="field" d="M0 0h18v12H0z"/>'
            f'<path class="shade" fill-opacity="{_opacity(level)}" d="M0 0h18v12H0z"/></svg>'
        )
        items.append(tag("li", join([Html(swatch), tag("span", text)], "")))
    return tag("ul", join(items), class_="key")


def _opacity(level: int) -> str:
    return f"{level / LEVELS:.3g}"


def _margin(names: Sequence[str]) -> float:
    """Room for the longest name that is written."""
    longest = max(map(_length, _written(names).values()), default=1.0)
    return 8.0 + 6.9 * longest


def _shortened(name: str) -> str:
    """Both ends of a name that is too long: classes often differ in the last letters."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[1 - half :]}"


def _length(name: str) -> float:
    """In letters; those of East Asian scripts are wider."""
    return sum(1.6 if unicodedata.east_asian_width(letter) in "WF" else 1.0 for letter in name)


def _written(names: Sequence[str]) -> dict[int, str]:
    if len(names) <= _NAMED:
        return {i: _shortened(name) for i, name in enumerate(names)}
    step = next(s for s in (5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if len(names) / s <= 12)
    return {i: str(i) for i in range(0, len(names), step)}


def _names(names: Sequence[str], place: Callable[[int], tuple[float, float]], anchor: str, turned: int) -> list[Html]:
    return [_text(name, *place(i), anchor, turned) for i, name in _written(names).items()]


def _text(text: str, x: float, y: float, anchor: str, turned: int) -> Html:
    turn = f' transform="rotate({turned} {x:.6g} {y:.6g})"' if turned else ""
    middle = ' dominant-baseline="central"'
    return Html(f'<text x="{x:.6g}" y="{y:.6g}" text-anchor="{anchor}"{middle}{turn}>{escape(text)}</text>')
