"""A table of (path, label): CSV or TSV with a line of column names, or JSON lines; splits may be a column of it."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.splits import (
    SPLIT_NAMES,
    PackPlan,
    SplitRequest,
    chosen_splits,
    deal_to_splits,
    list_some,
)
from oat_dist.errors import DataError

__all__ = ["HELP", "plan_table"]

HELP = """\
INPUT is a .csv or .tsv whose first line names its columns, or a .jsonl with one object per line;
columns path and label (a name or a whole number), optionally split; paths are relative to the table or --root"""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_NUMBER = re.compile(r"0|-?[1-9][0-9]*")


@dataclass(frozen=True)
class _Columns:
    path: str
    label: str
    split: str | None  # None: the column "split" if there is one


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str | None


def plan_table(
    input: str,
    *,
    splits: SplitRequest,
    seed: int,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    root: str | None = None,
    classes: str | None = None,
    on_bad: str = "stop",
) -> PackPlan:
    """The rows of a table; each file is looked for now and read only when packed.

    Labels that are all whole numbers stay in the order of the numbers, others are sorted as texts; with `classes`
    the file says the names and their order, and labels may also be positions in it, from 0.

    Args:
        path_column, label_column, split_column: default "path", "label", and "split" where there is such a column.
        root: folder that paths are relative to. Default: the folder of the table.
        classes: a text file with one class name per line.
        on_bad: "stop": a file that is not there is an error now; "skip": one that the packer skips and lists.

    Raises:
        DataError: no such table or column, a line that cannot be used, files that are missing; with line numbers.
    """
    table = Path(input)
    columns = _Columns(path_column or "path", label_column or "label", split_column)
    rows = _read_rows(table, columns)
    names, labels, notes = _read_classes(table, rows, classes)
    base = os.path.normpath(Path(root if root is not None else table.parent).absolute())
    if not Path(base).is_dir():
        raise DataError(f"{base}: no such folder; --root is the folder that the paths are relative to")

    there = list(dict.fromkeys(row.split for row in rows))
    is_split = there != [None]
    wanted = set(chosen_splits(table, map(str, there), splits) if is_split else there)
    by_split: dict[str | None, list[Sample]] = {split: [] for split in there if split in wanted}
    files, missing = _Files(), list[str]()
    shared: set[str] = set()
    for row, name, path in _located(table, rows, base, shared):
        if row.split in wanted:
            data: str | Callable[[], bytes] = path
            fault = files.fault(path)
            if fault:
                missing.append(f"{row.path if row.path.isprintable() else repr(row.path)} (line {row.line})")
                data = functools.partial(_refuse, f"line {row.line}: {fault}")
            by_split[row.split].append(Sample(name, labels[row.label], data))
    if missing:
        total = sum(map(len, by_split.values()))
        text = f"{len(missing):,} of {total:,} files are missing: {list_some(missing)}"
        if on_bad == "stop" or len(missing) == total:
            raise DataError(
                f"{table}: {text}; paths are relative to {base} (--root)"
                + ("; or leave them out with --on-bad skip" if len(missing) < total else "")
            )
        notes.append(text)
    if shared:
        notes.append(f"leak: {len(shared):,} files are in more than one split: {list_some(sorted(shared))}")
    if is_split:
        return PackPlan("table", names, {str(split): samples for split, samples in by_split.items()}, notes)
    return PackPlan("table", names, deal_to_splits(by_split[None], splits or {"train": None}, seed), notes)


def _located(table: Path, rows: list[_Row], base: str, shared: set[str]) -> Iterator[tuple[_Row, str, str]]:
    """Each row with its sample's name and its file's path; adds to `shared` the names that several splits hold."""
    inside = base.rstrip(os.sep) + os.sep
    first: dict[str, _Row] = {}
    others: dict[tuple[str, str | None], _Row] = {}
    for row in rows:
        path = os.path.normpath(row.path if row.path.startswith(os.sep) else inside + row.path)
        # below the root, paths are named from there: nothing of this machine is written
        name = path[len(inside) :] if path.startswith(inside) else os.path.normpath(row.path)
        before = first.setdefault(name, row)
        if before is not row:
            if before.split != row.split:
                shared.add(name)
                before = others.setdefault((name, row.split), row)
            if before is not row:
                raise DataError(f"{table}: line {row.line}: {row.path!r} is in line {before.line} already; remove one")
        yield row, name, path


def _refuse(reason: str) -> NoReturn:
    raise DataError(reason)


class _Files:
    """Which files there are, each folder read once: a question a file takes too long on a network's file system."""

    def __init__(self) -> None:
        self._folders: dict[str, set[str]] = {}

    def fault(self, path: str) -> str | None:
        """Why `path` cannot be read as a file; a pipe, say, would keep the packer waiting for ever."""
        folder, _, name = path.rpartition(os.sep)
        if folder not in self._folders:
            self._folders[folder] = self._listing(folder)
        if name in self._folders[folder]:
            return None
        try:
            return None if stat.S_ISREG(Path(path).stat().st_mode) else "not a file"
        except OSError as error:
            return error.strerror
        except ValueError:  # a NUL or half a character in it
            return "not a path"

    def _listing(self, folder: str) -> set[str]:
        try:
            with os.scandir(folder or os.sep) as entries:
                return {entry.name for entry in entries if entry.is_file()}
        except (OSError, ValueError):
            return set()


def _read_rows(table: Path, columns: _Columns) -> list[_Row]:
    suffix = table.suffix.lower()
    if suffix not in (*_DELIMITERS, *_JSON_LINES):
        raise DataError(f"{table}: a table is a file named .csv, .tsv or .jsonl; give one of these")
    try:
        # newline="": the csv module wants line ends as they are
        with table.open(encoding="utf-8-sig", newline="") as file:
            records = _json_records(file, table) if suffix in _JSON_LINES else _csv_records(file, table, columns)
            rows = list(_rows(records, table, columns))
    except FileNotFoundError:
        raise DataError(f"{table}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{table}: is not text in UTF-8; save it so") from None
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror}); check its permissions") from error
    if not rows:
        raise DataError(f"{table}: has no rows; nothing to pack")
    return rows


def _rows(records: Iterator[tuple[int, dict[str, Any]]], table: Path, columns: _Columns) -> Iterator[_Row]:
    split_column = columns.split
    for count, (line, record) in enumerate(records):
        if not count and split_column is None and "split" in record:
            split_column = "split"
        values = []
        for column in (columns.path, columns.label, *([split_column] if split_column is not None else [])):
            if column not in record:
                raise DataError(f"{table}: line {line}: has no {column!r}; it has {', '.join(map(repr, record))}")
            value = record[column]
            whole = column == columns.label and isinstance(value, int) and not isinstance(value, bool)
            if not isinstance(value, str) and not whole:
                expected = "a text or a whole number" if column == columns.label else "a text"
                raise DataError(f"{table}: line {line}: {column} is {value!r}, not {expected}")
            text = value if column == columns.path else str(value).strip()
            if not text:
                raise DataError(f"{table}: line {line}: {column} is empty")
            values.append(text)
        path, label, *split = values
        # interned: millions of rows share few labels and splits
        yield _Row(
            line, path, sys.intern(label), sys.intern(SPLIT_NAMES.get(split[0].lower(), split[0])) if split else None
        )


def _csv_records(file: Any, table: Path, columns: _Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields by column of each row; quoted fields may hold separators and line ends."""
    reader = csv.reader(file, delimiter=_DELIMITERS[table.suffix.lower()], strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = [name.strip() for name in fields]
                _check_header(header, table, columns)
            elif fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"{table}: line {line}: has {len(fields)} fields, the first line {len(header)}; "
                        'put a field that holds the separator into "quotes"'
                    )
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{table}: line {line}: {error}; mend the quotes") from error


def _check_header(header: list[str], table: Path, columns: _Columns) -> None:
    there = ", ".join(map(repr, header))
    for option, name in (("path", columns.path), ("label", columns.label), ("split", columns.split)):
        if name is not None and name not in header:
            hint = "; are its columns separated by ';'? Use ','" if len(header) == 1 and ";" in header[0] else ""
            raise DataError(
                f"{table}: the first line names no column {name!r}; it has {there}; choose with --{option}-column{hint}"
            )
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f"{table}: two columns are named {name!r}; rename one")


def _json_records(file: Any, table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be read"
            raise DataError(f"{table}: line {line}: not JSON ({reason}); write one object per line") from error
        if not isinstance(record, dict):
            raise DataError(f'{table}: line {line}: not an object such as {{"path": "a.jpg", "label": "cat"}}')
        yield line, record


def _read_classes(table: Path, rows: list[_Row], file: str | None) -> tuple[list[str], dict[str, str], list[str]]:
    """Class names in order, the class of each label, and notes."""
    first = {row.label: row.line for row in reversed(rows)}  # the first line of each label
    numbers = all(map(_NUMBER.fullmatch, first))
    if numbers:
        for label, line in first.items():
            if label.startswith("-"):
                raise DataError(f"{table}: line {line}: label {label} is below 0; number the classes from 0")
    if file is None:
        names = sorted(first, key=int) if numbers else sorted(first)
        _refuse_single_class(table, names)
        notes = []
        if numbers and names != [str(k) for k in range(len(names))]:
            notes.append(f"labels are {len(names)} numbers from {names[0]} to {names[-1]}; class 0 is {names[0]!r}")
        return names, {name: name for name in names}, notes
    names = _listed_classes(Path(file))
    known = set(names)
    if numbers and not first.keys() <= known:
        positions = {str(k): name for k, name in enumerate(names)}
        for label, line in first.items():
            if label not in positions:
                raise DataError(
                    f"{table}: line {line}: label {label} is out of range for the {len(names)} classes of {file} "
                    f"(0 to {len(names) - 1})"
                )
        return names, positions, []
    for label, line in sorted(first.items(), key=lambda item: item[1]):
        if label not in known:
            raise DataError(f"{table}: line {line}: label {label!r} is not in {file}; add it there or mend the label")
    return names, {name: name for name in names}, []


def _listed_classes(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise DataError(
            f"{file}: cannot be read ({reason}); --classes is a text file, one class name a line"
        ) from error
    _refuse_single_class(file, names)
    return names


def _refuse_single_class(where: Path, names: list[str]) -> None:
    if len(names) < 2:
        raise DataError(f"{where}: has {len(names)} class{'es' * (not names)}; a classifier needs two")
