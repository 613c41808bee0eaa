"""The two files in which a run folder keeps its evaluation: measures as JSON, the answer to every sample as tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from oat_dist.files import write_atomic
from oat_dist.results import Evaluation

__all__ = ["write_evaluation"]


def write_evaluation(folder: Path, evaluation: Evaluation, classes: list[str], facts: dict[str, Any]) -> None:
    """Write ``evaluation.json`` and ``evaluation.safetensors`` (ids, labels, predicted classes, their probabilities).

    Args:
        facts: of the checkpoint and the data: at least checkpoint, split and eval_digest.
    """
    whose = {key: str(facts[key]) for key in ("checkpoint", "split", "eval_digest")}
    write_atomic(folder / "evaluation.safetensors", save(evaluation.answers(), metadata=whose))
    text = _a_key_a_line({**facts, **evaluation.summary(classes)})
    write_atomic(folder / "evaluation.json", text.encode(errors="backslashreplace"))  # lone surrogates of class names


def _a_key_a_line(values: dict[str, Any]) -> str:
    """JSON that a person can read and that does not give each number of a long list a line of its own."""

    def lines(value: Any, indent: int) -> str:
        if not isinstance(value, dict) or not value:
            return json.dumps(value, ensure_ascii=False)
        pad = " " * (indent + 1)
        inner = ",\n".join(
            f"{pad}{json.dumps(k, ensure_ascii=False)}: {lines(v, indent + 1)}" for k, v in value.items()
        )
        return f"{{\n{inner}\n{' ' * indent}}}"

    return lines(values, 0) + "\n"
