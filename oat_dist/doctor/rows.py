"""What the doctor says: one row a check, as a table, as plain lines, or as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["FAIL", "PASS", "SKIP", "WARN", "Row", "as_json", "bytes_text", "print_rows", "summary"]

PASS, WARN, FAIL, SKIP = "pass", "warn", "fail", "skip"
_STYLES = {PASS: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim"}


@dataclass(frozen=True)
class Row:
    """One check: its name, how it ended (`PASS`, `WARN`, `FAIL`, `SKIP`: not looked at), what was found, what to do."""

    check: str
    status: str
    found: str
    remedy: str = ""


def bytes_text(count: float) -> str:
    """``512 B``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def summary(rows: Sequence[Row], seconds: float) -> str:
    """The last line: how many of each."""
    counts = Counter(row.status for row in rows)
    words = ((FAIL, "failed"), (WARN, "warned"), (PASS, "passed"), (SKIP, "skipped"))
    return f"{', '.join(f'{counts[status]} {word}' for status, word in words if counts[status])} ({seconds:.0f} s)"


def print_rows(title: str, rows: Sequence[Row], seconds: float) -> None:
    """A table on a terminal; where stdout is none, one line a row (and one a remedy), for logs and grep."""
    end = summary(rows, seconds)
    if sys.stdout.isatty():
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            text = Text(row.found)
            if row.remedy:
                text.append(f"\n-> {row.remedy}", style="bold")
            table.add_row(Text(row.status, style=_STYLES[row.status]), Text(row.check), text)
        console = Console(highlight=False)
        for part in (Text(title), Text(), table, Text(), Text(end)):
            console.print(part)
        return
    width = max(len(row.check) for row in rows)
    print(f"{title}\n")
    for row in rows:
        print(f"{row.status}  {row.check:<{width}}  {row.found}")
        if row.remedy:
            print(f"{'':<{width + 6}}  -> {row.remedy}")
    print(f"\n{end}", flush=True)


def as_json(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """`ok` says whether nothing failed."""
    ok = all(row.status != FAIL for row in rows)
    return {"ok": ok, **facts, "rows": [dataclasses.asdict(row) for row in rows]}
