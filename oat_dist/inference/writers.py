"""Answers as lines: a table for people, CSV, or JSON Lines.

JSON Lines hold every name exactly, in ASCII. In tables and CSV, what is not printable in a name is written as an escape
(``\\n``, ``\\x1b``, ``\\udcff``), so that one answer stays one line and a terminal is safe.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from oat_dist.inference.sources import Item

__all__ = ["FORMATS", "Ranked", "Writer", "open_writer", "printable"]

FORMATS = ("table", "csv", "jsonl")


@dataclass(frozen=True)
class Ranked:
    """One class of an answer."""

    name: str
    label: int
    probability: float


class Writer(Protocol):
    """Takes answers in order, each with its best classes, the best first."""

    def write(self, rows: Sequence[tuple[Item, Sequence[Ranked]]]) -> None: ...


def open_writer(form: str, file: TextIO, top: int, *, aligned: bool = False) -> Writer:
    """A writer of one of `FORMATS`.

    Args:
        top: how many classes each answer has.
        aligned: pad the columns of a table, for a terminal; else a tab stands between them.
    """
    if form == "csv":
        return _Csv(file, top)
    return _JsonLines(file) if form == "jsonl" else _Table(file, aligned)


def printable(text: str) -> str:
    """The text in one line that is safe to print."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def _put(file: TextIO, text: str) -> None:
    """Write a text, with escapes for what the encoding of a terminal lacks."""
    encoding = file.encoding or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _Table:
    def __init__(self, file: TextIO, aligned: bool) -> None:
        self._file, self._aligned = file, aligned
        self._widths: list[int] = []

    def write(self, rows: Sequence[tuple[Item, Sequence[Ranked]]]) -> None:
        lines = []
        for item, ranking in rows:
            cells = [printable(item.name)]
            for one in ranking:
                cells += [printable(one.name), f"{one.probability:.3f}"]
            lines.append(cells)
        if self._aligned:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            before = self._widths or widths
            self._widths = [max(pair) for pair in zip(before, widths, strict=True)]
            lines = [[cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)] for cells in lines]
        _put(self._file, "".join(("  " if self._aligned else "\t").join(cells) + "\n" for cells in lines))


class _Csv:
    """``file,member,class,probability``; with more classes ``class_2,probability_2`` and so on."""

    def __init__(self, file: TextIO, top: int) -> None:
        self._file = file
        more = [f"{column}_{number}" for number in range(2, top + 1) for column in ("class", "probability")]
        self._lines([["file", "member", "class", "probability", *more]])

    def write(self, rows: Sequence[tuple[Item, Sequence[Ranked]]]) -> None:
        lines = []
        for item, ranking in rows:
            lines.append([printable(item.file), printable(item.member or "")])
            for one in ranking:
                lines[-1] += [printable(one.name), repr(one.probability)]
        self._lines(lines)

    def _lines(self, lines: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        _put(self._file, text.getvalue())


class _JsonLines:
    """``{"file", "member", "class", "label", "probability"}``; with more classes also ``"top"``, the best included."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, rows: Sequence[tuple[Item, Sequence[Ranked]]]) -> None:
        for item, ranking in rows:
            classes = [{"class": one.name, "label": one.label, "probability": one.probability} for one in ranking]
            line: dict[str, object] = {"file": item.file, "member": item.member, **classes[0]}
            if len(classes) > 1:
                line["top"] = classes
            self._file.write(json.dumps(line) + "\n")
