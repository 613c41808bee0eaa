"""The section on confusions: who is taken for whom. A table with numbers, beyond 20 classes a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from oat_dist.report.data import Run
from oat_dist.report.evaluation import Evaluation
from oat_dist.report.grid import LEVELS, grid_svg, shade_key
from oat_dist.report.html import Html, details, escape, figure, join, section, table, tag

__all__ = ["cells_of", "confusion", "top_pairs"]

_NUMBERED = 20  # classes up to which each cell shows its number
_DRAWN = 200  # classes up to which the matrix is drawn at all
_PAIRS = 12

Cells = Mapping[tuple[int, int], int]


def cells_of(run: Run, protocol: str) -> dict[tuple[int, int], int]:
    """{(true, predicted): samples} under a protocol: out of evaluation.json, else counted from the answers."""
    if run.evaluation is not None and protocol in run.evaluation.confusion:
        return run.evaluation.confusion[protocol]
    if run.predictions is None or protocol not in run.predictions.predicted:
        return {}
    table_N2 = np.stack([run.predictions.labels_N, run.predictions.predicted[protocol]], axis=1).astype(np.int64)
    pairs, counts = np.unique(table_N2, axis=0, return_counts=True)
    return {(true, predicted): n for (true, predicted), n in zip(pairs.tolist(), counts.tolist(), strict=True)}


def top_pairs(cells: Cells, count: int = _PAIRS) -> list[tuple[int, int, int, float]]:
    """The most frequent mistakes: (true, predicted, samples, share of the true class), most samples first."""
    totals = _totals(cells)
    wrong = [(true, predicted, n, n / totals[true]) for (true, predicted), n in cells.items() if true != predicted]
    return sorted(wrong, key=lambda pair: (-pair[2], -pair[3], pair[:2]))[:count]


def confusion(run: Run) -> Html:
    """The matrix under the headline's protocol, the pairs most often confused, and, of few classes, other protocols."""
    title = "Confusion"
    evaluation = run.evaluation
    if evaluation is None:
        return section(title, tag("p", "Nothing to show: the run has no evaluation.json."))
    cells = cells_of(run, run.protocol)
    if not cells:
        return section(
            title,
            tag(
                "p",
                "evaluation.json holds no confusion matrix: an older version wrote it. "
                "Write it anew with oat-dist evaluate RUN --save.",
            ),
        )
    classes = _count(evaluation, cells)
    others = [s.protocol for s in evaluation.scores if s.protocol != run.protocol]
    both = [_matrix(evaluation, cells, classes, run.protocol), _pairs(evaluation, cells, run.protocol)]
    parts: list[Any] = [tag("div", join(both), class_="side")]
    if classes <= _NUMBERED:
        for protocol in others:
            if more := cells_of(run, protocol):
                matrix = _matrix(evaluation, more, classes, protocol)
                parts.append(details(f"Confusion matrix under “{protocol}”", matrix, printed=False))
    return section(title, *parts)


def _count(evaluation: Evaluation, cells: Cells) -> int:
    return max(len(evaluation.class_names), 1 + max(max(pair) for pair in cells))


def _totals(cells: Cells) -> dict[int, int]:
    totals: dict[int, int] = {}
    for (true, _), n in cells.items():
        totals[true] = totals.get(true, 0) + n
    return totals


def _level(share: float) -> int:
    """0..LEVELS, by the square root: a few mistakes can be seen beside many right answers."""
    return math.ceil(LEVELS * math.sqrt(share) - 1e-9) if share > 0 else 0


def _matrix(evaluation: Evaluation, cells: Cells, classes: int, protocol: str) -> Html:
    title = f"Confusion matrix under “{protocol}”"
    samples = f"{sum(cells.values()):,} samples of split “{evaluation.raw.get('split', '?')}”"
    shades = "Shaded by share of the true class (square root); right answers lie on the diagonal."
    if classes > _DRAWN:
        return tag("p", f"{classes:,} classes are too many to draw a matrix of; the pairs below are the most frequent.")
    if classes <= _NUMBERED:
        caption = f"{samples}: rows are the true classes, columns the predicted ones. {shades}"
        return figure(title, _numbers(evaluation, cells, classes), caption, class_="wide")
    totals = _totals(cells)
    levels = np.zeros((classes, classes), dtype=np.int64)
    for (true, predicted), n in cells.items():
        levels[true, predicted] = _level(n / totals[true])
    names = [evaluation.class_name(k) for k in range(classes)]
    drawn = grid_svg(
        levels,
        f"Heat map. {title}: {_in_words(evaluation, cells)}",
        rows=names,
        columns=names,
        row_title="true class",
        column_title="predicted class",
        second=lambda true, predicted: true == predicted,
        width=620.0,
    )
    scale = [(level, f"{100 * (level / LEVELS) ** 2:.0f} %") for level in (1, 3, 6, 9)]
    numbers = "" if classes <= 40 else " Classes are numbered in their order, from 0."
    caption = f"{samples}. {shades}{numbers}"
    return figure(title, join([tag("div", drawn, class_="scroll"), shade_key(scale)]), caption, class_="wide")


def _in_words(evaluation: Evaluation, cells: Cells) -> str:
    right = sum(n for (true, predicted), n in cells.items() if true == predicted)
    worst = top_pairs(cells, 1)
    text = f"{right:,} of {sum(cells.values()):,} on the diagonal"
    if worst:
        true, predicted, n, _ = worst[0]
        text += (
            f"; most often {evaluation.class_name(true)} is taken for {evaluation.class_name(predicted)}, {n:,} times"
        )
    return f"{text}."


def _numbers(evaluation: Evaluation, cells: Cells, classes: int) -> Html:
    totals = _totals(cells)
    names = [evaluation.class_name(k) for k in range(classes)]
    turned = [tag("th", tag("span", name, title=name), scope="col") for name in names]
    head = tag("tr", join([tag("td", "true ↓ predicted →", class_="corner"), *turned], ""))
    rows = []
    for true in range(classes):
        line = [tag("th", names[true], scope="row", title=names[true])]
        for predicted in range(classes):
            n = cells.get((true, predicted), 0)
            level = _level(n / totals[true]) if n else 0
            shade = ("d" if true == predicted else "e") + (f" k{level}" if level else "")
            line.append(tag("td", f"{n:,}" if n else escape("·"), class_=shade))
        rows.append(tag("tr", join(line, "")))
    matrix = tag("table", join([tag("thead", head), tag("tbody", join(rows))]), class_="confusion")
    return tag("div", matrix, class_="scroll", tabindex="0", role="region", aria_label="Confusion matrix")


def _pairs(evaluation: Evaluation, cells: Cells, protocol: str) -> Html:
    rows = [
        [
            join([evaluation.class_name(true), Html("→"), evaluation.class_name(predicted)], " "),
            f"{n:,}",
            f"{100 * share:.1f}",
        ]
        for true, predicted, n, share in top_pairs(cells)
    ]
    if not rows:
        return tag("p", "No mistake at all.")
    caption = f"Most confused pairs under “{protocol}”: true class → predicted class, share of the true class"
    return table(["Pair", "Samples#", "Share %#"], rows, caption=caption)
