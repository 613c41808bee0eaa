"""Whether all ranks run the same software: a difference makes other numbers at best, and a hang at worst."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import oat_dist
from oat_dist.distributed import World
from oat_dist.doctor.looks import Place, Trouble, by_node, differing, trouble_rows
from oat_dist.doctor.rows import FAIL, PASS, WARN, Row
from oat_dist.run_facts import environment

__all__ = ["judge", "look"]

_NAMES = ("python", "oat_dist", "torch", "torchvision", "accelerate", "deepspeed", "webdataset", "safetensors", "numpy")
_MUST_AGREE = ("torch", "CUDA", "our code")
_ABSENT = "not installed"


def look() -> dict[str, str]:
    """Name to version, as environment.json of a run has them; besides what no version number tells."""
    facts = environment(World())
    return {
        **{name: str(facts[name]) for name in _NAMES},
        "CUDA": str(torch.version.cuda or "none"),
        "our code": _digest(Path(oat_dist.__file__).parent),
    }


def _digest(package: Path) -> str:
    """Of all its source files: two checkouts may call themselves by the same version."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def judge(found: Sequence[dict[str, str] | Trouble], places: Sequence[Place], needs_deepspeed: bool) -> list[Row]:
    rows = trouble_rows("versions", found, places)
    seen: list[tuple[dict[str, str], Place]] = [
        (one, place) for one, place in zip(found, places, strict=True) if not isinstance(one, Trouble)
    ]
    if not seen:
        return rows
    there = [place for _, place in seen]
    names = [name for name in seen[0][0] if name != "deepspeed" or needs_deepspeed]
    different: dict[str, str] = {}
    for name in names:
        text = differing([versions[name] for versions, _ in seen], there)
        if text:
            different[name] = f"{name}: {text}"
    for status, wanted in ((FAIL, True), (WARN, False)):
        texts = [text for name, text in different.items() if (name in _MUST_AGREE) == wanted]
        if texts:
            rows.append(Row("versions", status, "; ".join(texts), _remedy(places)))
    missing = [name for name in names if any(versions[name] == _ABSENT for versions, _ in seen)]
    if missing and not different:
        needed = ", ".join(missing)
        rows.append(Row("versions", FAIL, f"{needed}: {_ABSENT}", f"pip install {' '.join(missing)}"))
    return rows or [Row("versions", PASS, f"{_listed(seen[0][0], names)}{_everywhere(places)}")]


def _remedy(places: Sequence[Place]) -> str:
    where = "the same environment on every node" if len(by_node(places)) > 1 else "one environment for all processes"
    return f"use {where}: a folder that all share, or one container image"


def _listed(versions: dict[str, Any], names: Sequence[str]) -> str:
    shown = [name for name in names if name not in ("our code", "CUDA") or versions[name] != "none"]
    return ", ".join(f"{name} {versions[name]}" for name in shown if name != "our code")


def _everywhere(places: Sequence[Place]) -> str:
    nodes = len(by_node(places))
    return f"; the same on {nodes} nodes" if nodes > 1 else ""
