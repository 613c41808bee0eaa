"""What one foreign shard holds, kept in a file until all shards are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.shard_list import Shard
from oat_dist.data.remote.fetch import shown
from oat_dist.data.tars.image_lots import Examine
from oat_dist.data.tars.shard_scan import scan_shard
from oat_dist.data.tars.tarsamples import AmbiguousError, ShardScan
from oat_dist.errors import DataError

__all__ = [
    "SKIPPED_LISTED",
    "OnMissing",
    "PartFacts",
    "count_words",
    "label_hint",
    "read_part",
    "sample_name",
    "scan_part",
]

OnMissing = Literal["stop", "skip"]

SKIPPED_LISTED = 100_000  # in the manifest, which is read whole at every start; the counts are always complete
_SHOWN = 3
_JSON_KEYS = 12
_KINDS = 100


@dataclass(frozen=True)
class PartFacts:
    """A shard apart from its rows.

    Attributes:
        labels: the different labels as text; the column `label` numbers them.
        damage: why the tar is of no use; "" otherwise.
        bad: kind of fault -> how many samples are left out for it.
        listed: name and reason of these samples, the first `SKIPPED_LISTED`.
        others: kind of member -> how many were not used, the most frequent ones.
        json_keys: what the first JSON member that was not used holds.
    """

    number: int
    size: int
    sha256: str
    samples: int
    labels: list[str]
    damage: str
    bad: dict[str, int]
    listed: list[tuple[str, str]]
    others: dict[str, int]
    json_keys: list[str]


def scan_part(
    path: Path,
    number: int,
    shard: Shard,
    rules: Rules,
    examine: Examine,
    on_missing: OnMissing,
    threads: int,
    count_bytes: Callable[[int], None],
) -> None:
    """Read a shard and write what it holds to `path`.

    Raises:
        DataError: it cannot be read, or a sample has several images. With `on_missing="stop"` also: it is damaged, or
            some of its samples cannot be used; otherwise that is noted in the facts.
    """
    try:
        scan = scan_shard(shard.location, rules, examine, threads=threads, count_bytes=count_bytes)
    except FileNotFoundError:
        raise DataError(f"{shard.location}: no such file; it was there a moment ago") from None
    except AmbiguousError as error:
        raise DataError(f"{shown(shard.location)}: {error}") from None
    good = np.ones(len(scan.keys), dtype=bool)
    good[[fault.position for fault in scan.faults]] = False
    first = {fault.position: fault for fault in reversed(scan.faults)}  # one reason a sample is enough
    used, label = np.unique(scan.label[good], return_inverse=True)  # a class needs a sample that can be used
    facts = PartFacts(
        number=number,
        size=scan.size,
        sha256=scan.sha256,
        samples=int(good.sum()),
        labels=[scan.labels[code] for code in used.tolist()],
        damage=scan.damage,
        bad=dict(Counter(fault.kind for fault in first.values())),
        listed=[(sample_name(shard.name, scan.keys[i]), first[i].text) for i in sorted(first)[:SKIPPED_LISTED]],
        others=dict(scan.others.most_common(_KINDS)),
        json_keys=_json_keys(scan.json),
    )
    columns = {name: getattr(scan, name)[good] for name in ("offset", "length", "width", "height")}
    columns |= {"label": label.astype(np.int32), **_names(shard.name, scan, good)}
    if on_missing == "stop" and (facts.damage or facts.bad):
        raise DataError(_refusal(facts, shown(shard.location), rules))
    save_file(columns, path, metadata={"facts": json.dumps(asdict(facts))})


def read_part(path: Path) -> tuple[PartFacts, dict[str, np.ndarray]]:
    """The facts, and the columns of the index without the shard number."""
    with safe_open(path, "numpy") as file:
        values: dict[str, Any] = json.loads(file.metadata()["facts"])
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    values["listed"] = [(name, reason) for name, reason in values["listed"]]
    return PartFacts(**values), columns


def _names(shard: str, scan: ShardScan, good: np.ndarray) -> dict[str, np.ndarray]:
    encoded = [sample_name(shard, scan.keys[i]).encode() for i in np.flatnonzero(good).tolist()]
    return {
        "name_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.uint64),
    }


def sample_name(shard: str, key: str) -> str:
    """What a sample is called, from its shard's name in the manifest and its key."""
    name = f"{shard.removesuffix('.tar')}/{key}"
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _json_keys(data: bytes) -> list[str]:
    """Paths to the values of a JSON object that could be labels."""
    try:
        value = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return []
    found: list[str] = []

    def walk(value: Any, path: str, depth: int) -> None:
        if isinstance(value, dict) and depth < 3:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key), depth + 1)
        elif path and isinstance(value, (str, int)):
            found.append(path)

    walk(value, "", 0)
    return found[:_JSON_KEYS]


def count_words(bad: dict[str, int]) -> str:
    """ "8 without an image, 2 without a label"."""
    words = {
        "no image": "without an image",
        "no label": "without a label",
        "unreadable label": "with an unreadable label",
        "unreadable image": "with an unreadable image",
    }
    return ", ".join(f"{bad[kind]:,} {text}" for kind, text in words.items() if bad.get(kind))


def label_hint(facts: PartFacts, rules: Rules) -> str:
    """Where the labels may be, when most samples have none; "" otherwise."""
    bad = facts.bad.get("no label", 0) + facts.bad.get("unreadable label", 0)
    if bad <= facts.samples:
        return ""
    kinds = [kind for kind, _ in Counter(facts.others).most_common(6) if kind]
    if not kinds:
        return ""
    keys = f" (json:KEY with KEY one of {', '.join(facts.json_keys)})" if facts.json_keys else ""
    return f"if the labels are not in .{rules.label}, say where: --label, members there are {', '.join(kinds)}{keys}"


def _refusal(facts: PartFacts, shard: str, rules: Rules) -> str:
    """Why the shard stops the indexing, in one line."""
    if facts.damage:
        return f"{shard}: {facts.damage}"
    total = facts.samples + sum(facts.bad.values())
    examples = ", ".join(name.partition("/")[2] for name, _ in facts.listed[:_SHOWN])
    hint = label_hint(facts, rules)
    return (
        f"{shard}: {sum(facts.bad.values()):,} of {total:,} samples cannot be used, {count_words(facts.bad)} "
        f"(first: {examples}; {facts.listed[0][1]}); {hint + '; ' if hint else ''}"
        "leave such samples out and list them with --on-missing skip"
    )
