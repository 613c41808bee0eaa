"""The two halves of a check: every rank looks, with no word to the others; rank 0 judges what all of them saw.

Whatever goes wrong in a look becomes a `Trouble`, a value like any other, so that no rank leaves the others waiting.
Judging is a pure function of plain facts.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from os import environ
from typing import Any, TypeVar

from oat_dist.doctor.rows import FAIL, Row
from oat_dist.errors import OatError

__all__ = ["Place", "Trouble", "attempt", "by_node", "differing", "node_name", "ranks_text", "trouble_rows"]

T = TypeVar("T")


@dataclass(frozen=True)
class Trouble:
    """What kept a rank from seeing anything, and what to do about it."""

    found: str
    remedy: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """An error of ours is written "what; remedy"."""
        if isinstance(error, OatError):
            found, _, remedy = " ".join(str(error).split()).partition("; ")
            return cls(found, remedy)
        if isinstance(error, OSError) and error.strerror:
            return cls(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        lines = str(error).strip().splitlines()
        return cls(f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__)


@dataclass(frozen=True)
class Place:
    """Where a rank runs. `node` is the scheduler's name of the machine where it has one, `host` the machine's own."""

    rank: int
    local_rank: int
    node: str
    host: str


def node_name() -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def attempt(look: Callable[..., T], *arguments: Any) -> T | Trouble:
    """What `look` sees, or what kept it from seeing."""
    try:
        return look(*arguments)
    except Exception as error:  # whatever is wrong with this machine: a row of the table, not the end of it
        return Trouble.of(error)


def by_node(places: Iterable[Place]) -> dict[str, list[Place]]:
    nodes: dict[str, list[Place]] = {}
    for place in places:
        nodes.setdefault(place.node, []).append(place)
    return nodes


def ranks_text(places: Sequence[Place]) -> str:
    """``node1 (ranks 0-3), node2 (rank 4)``."""
    return ", ".join(f"{node} ({_numbers([p.rank for p in there])})" for node, there in by_node(places).items())


def _numbers(ranks: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def differing(values: Sequence[Hashable], places: Sequence[Place]) -> str:
    """Who has which value, the most frequent first: ``1 on node1 (rank 0), 2 on node2 (rank 1)``; "" if all agree."""
    groups: dict[Hashable, list[Place]] = {}
    for value, place in zip(values, places, strict=True):
        groups.setdefault(value, []).append(place)
    if len(groups) < 2:
        return ""
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return ", ".join(f"{value} on {ranks_text(there)}" for value, there in ordered)


def trouble_rows(check: str, found: Sequence[Any], places: Sequence[Place], status: str = FAIL) -> list[Row]:
    """One row for each trouble among what the ranks found, naming the ranks where it is not on all of them."""
    groups: dict[Trouble, list[Place]] = {}
    for one, place in zip(found, places, strict=True):
        if isinstance(one, Trouble):
            groups.setdefault(one, []).append(place)
    rows = []
    for trouble, there in groups.items():
        where = "" if len(there) == len(places) else f" [on {ranks_text(there)}]"
        rows.append(Row(check, status, f"{trouble.found}{where}", trouble.remedy))
    return rows
