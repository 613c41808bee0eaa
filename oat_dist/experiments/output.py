"""Writes a table: Markdown, CSV, one self-contained page, JSON with every seed, and figures. Only what has changed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oat_dist.errors import OatError
from oat_dist.experiments.content import Content, Grid
from oat_dist.experiments.plan import Plan
from oat_dist.experiments.statistics import Mean, verdict
from oat_dist.experiments.summary import Results, Row, Times
from oat_dist.files import write_atomic
from oat_dist.report.drawing import key, numbered_look
from oat_dist.report.html import Html, contents, document, figure, join, section, table, tag

__all__ = ["Drawn", "csv_text", "html_text", "json_text", "markdown_text", "write_changed"]

Drawn = tuple[str, Html, Sequence[tuple[int, str]], str]  # title, drawing, entries of the key, caption


def write_changed(path: Path, data: bytes | str) -> bool:
    """Write a file unless it holds just that; whether it was written.

    Raises:
        OatError: it cannot be written.
    """
    content = data.encode(errors="replace") if isinstance(data, str) else data
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise OatError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
    return True


def markdown_text(content: Content, figures: Mapping[str, str]) -> str:
    """The table as Markdown; `figures` are files beside it, by title."""
    parts = [f"# {content.title}", *content.about]
    for number, grid in enumerate(content.grids):
        parts += [f"## {grid.title}", _grid_lines(grid), *grid.notes]
        if number == 0:  # what the figures show stands in the first table
            parts += [f"![{title}]({name})" for title, name in figures.items()]
    parts += ["## What it is, and in what it differs", "\n".join(f"- {_escaped(note)}" for note in content.notes)]
    parts += ["## Made by", f"```\n{content.command}\n```"]
    return "\n\n".join(parts) + "\n"


def _grid_lines(grid: Grid) -> str:
    marks = ["---:" if cell.endswith("#") else "---" for cell in grid.head]
    lines = [[cell.removesuffix("#") for cell in grid.head], marks, *grid.rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def html_text(content: Content, figures: Mapping[str, Sequence[Drawn]], links: Html) -> str:
    """The table as one page; `figures` by the section they stand in."""
    sections = [
        section(grid.title, table(grid.head, grid.rows), *(tag("p", note, class_="note") for note in grid.notes))
        for grid in content.grids
    ]
    sections[1:1] = [
        section(name, tag("div", join(map(_figure, drawn)), class_="figures"))
        for name, drawn in figures.items()
        if drawn
    ]
    if links:
        sections.append(section("Images", links))
    sections.append(
        section("What it is, and in what it differs", tag("ul", join(tag("li", note) for note in content.notes)))
    )
    sections.append(section("Made by", tag("pre", content.command)))
    head = tag("header", join([tag("h1", content.title), *(tag("p", text) for text in content.about)]))
    return document(content.title, head, contents(sections), *sections)


def _figure(drawn: Drawn) -> Html:
    title, svg, entries, caption = drawn
    looks = key([(numbered_look(number), name) for number, name in entries])
    return figure(title, join([svg, looks]), caption, class_="half")


def csv_text(plan: Plan, rows: Sequence[Row]) -> str:
    """A line for each cell, arm, checkpoint and protocol."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["cell", "arm", "checkpoint", "protocol", "own", "seeds", "missing", "diverged"]
    for name in ("measure", "accuracy", "balanced", "difference"):
        head += [name, f"{name}_low", f"{name}_high"]
    writer.writerow([*head, "against", "verdict", "paper", "minus_paper", "by_seed"])
    for row in rows:
        where = [row.cell, row.arm, row.checkpoint]
        gone = [" ".join(map(str, row.missing)), " ".join(map(str, row.diverged))]
        for name, score in row.scores.items():
            own = name == row.protocol
            numbers = [n for one in (score.mean, score.accuracy, score.balanced, score.difference) for n in _cells(one)]
            by_seed = " ".join(f"{seed}={value:.4f}" for seed, value in score.values.items())
            paper = [row.paper, row.to_paper if row.to_paper is None else round(row.to_paper, 4)] if own else ["", ""]
            line = [*where, name, int(own), len(score.values), *gone, *numbers, score.against]
            writer.writerow([*line, verdict(score.difference), *paper, by_seed])
        if not row.scores:
            writer.writerow([*where, row.protocol, 1, 0, *gone, *[""] * 14, row.paper, "", ""])
    return file.getvalue()


def _cells(mean: Mean | None) -> list[Any]:
    if mean is None:
        return ["", "", ""]
    low, high = mean.interval or ("", "")
    return [round(one, 4) if isinstance(one, float) else one for one in (mean.mean, low, high)]


def json_text(plan: Plan, content: Content, rows: Sequence[Row], times: Sequence[Times], results: Results) -> str:
    """Everything, with the numbers of every seed."""

    def mean(one: Mean | None) -> Any:
        return None if one is None else {"count": one.count, "mean": one.mean, "interval": one.interval}

    table_rows = [
        {
            "cell": row.cell,
            "arm": row.arm,
            "checkpoint": row.checkpoint,
            "protocol": row.protocol,
            "missing": row.missing,
            "diverged": row.diverged,
            "paper": row.paper,
            "minus_paper": row.to_paper,
            "protocols": {
                name: {
                    "by_seed": score.values,
                    "mean": mean(score.mean),
                    "accuracy": mean(score.accuracy),
                    "balanced": mean(score.balanced),
                    "against": score.against,
                    "difference": mean(score.difference),
                    "verdict": verdict(score.difference),
                }
                for name, score in row.scores.items()
            },
        }
        for row in rows
    ]
    shown = {(row.cell, row.arm) for row in rows}
    runs = {"/".join(map(str, where)): result.raw for where, result in results.items() if where[:2] in shown}
    values = {
        "title": content.title,
        "command": content.command,
        "measure": plan.table.measure,
        "baseline": plan.table.baseline,
        "seeds": list(plan.seeds),
        "notes": content.notes,
        "rows": table_rows,
        "times": [vars(one) for one in times],
        "runs": runs,
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
