"""What each arm differs by from the baseline, cell by cell: a figure for the last epoch, and one for the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from oat_dist.experiments.curves import files_of
from oat_dist.experiments.plan import Plan
from oat_dist.experiments.statistics import Mean
from oat_dist.experiments.summary import Row
from oat_dist.report.drawing import WIDTH, drawing, numbered_look, to_svg
from oat_dist.report.html import Html
from oat_dist.report.style import MUTED

__all__ = ["Across", "across", "across_files", "across_page"]

_FEWEST = 3  # cells: the table itself shows two
_CELL = 0.38  # inches of height


@dataclass(frozen=True)
class Across:
    """One figure.

    Attributes:
        name: of its files.
        title: what it is of.
        label: of its axis.
        cells: their titles.
        arms: number, which is that of its look, and title of each.
        points: number of the cell, number of the arm, difference in percentage points.
    """

    name: str
    title: str
    label: str
    cells: list[str]
    arms: list[tuple[int, str]]
    points: list[tuple[int, int, Mean]]


def across(plan: Plan, rows: Sequence[Row]) -> list[Across]:
    """The figures of a table; none where too few cells have differences."""
    table, found = plan.table, []
    for checkpoint, title in (("final", "Last epoch"), ("best", f"Best epoch on {table.select}")):
        mine = [
            (row, row.score.difference)
            for row in rows
            if row.checkpoint == checkpoint and row.score is not None and row.score.difference is not None
        ]
        cells = list(dict.fromkeys(row.cell for row, _ in mine))
        if len(cells) < _FEWEST:
            continue
        numbers = {arm: number for number, arm in enumerate(table.arms)}
        arms = [(numbers[arm], table.arms[arm].title) for arm in dict.fromkeys(row.arm for row, _ in mine)]
        points = [(cells.index(row.cell), numbers[row.arm], difference) for row, difference in mine]
        label = f"minus {table.arms[table.baseline].title}, percentage points"
        titles = [table.cells[cell].title for cell in cells]
        found.append(Across(f"differences-{checkpoint}", title, label, titles, arms, points))
    return found


def across_page(one: Across) -> Html:
    """The figure for within a page."""
    with drawing(one.name):
        return to_svg(
            _draw(one, Figure(figsize=(WIDTH, 0.8 + _CELL * len(one.cells)))),
            one.name,
            f"Dot chart: {one.title}, {one.label}",
        )


def across_files(one: Across) -> dict[str, bytes]:
    """The figure as files: their contents by ``svg`` and ``png``."""
    with drawing(one.name):
        height = 1.2 + _CELL * len(one.cells)
        figure = _draw(one, Figure(figsize=(1.5 * WIDTH, height), layout="constrained", facecolor="white"))
        figure.axes[0].set_title(one.title)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        return files_of(figure)


def _draw(one: Across, figure: Figure) -> Figure:
    axes = figure.add_subplot(1, 1, 1)
    axes.axvline(0, color=MUTED, linewidth=1.1)
    for place, (number, title) in enumerate(one.arms):
        look = numbered_look(number)
        beside = 0.64 * ((place + 0.5) / len(one.arms) - 0.5)  # arms of a cell one below the other
        axes.plot([], [], color=look.colour, marker=look.marker, label=title)  # for the legend
        for cell, _, difference in (point for point in one.points if point[1] == number):
            where = cell + beside
            if difference.interval is not None:
                axes.plot(difference.interval, [where, where], color=look.colour, linewidth=1.2)
            axes.plot([difference.mean], [where], color=look.colour, marker=look.marker)
    axes.set_yticks(range(len(one.cells)), one.cells)
    axes.set_ylim(len(one.cells) - 0.5, -0.5)  # the first one on top
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(one.label)
    return figure
