"""What the scores of a model are made with: the anchor of its training, or a class prior in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oat_dist.errors import CheckpointError, ConfigError

__all__ = ["Prior", "anchor_for", "class_prior"]

Prior = str | Mapping[str, float] | Sequence[float]


def anchor_for(prior: Prior, card: dict[str, Any], stored_anchor_C: Tensor | None) -> tuple[str, Tensor | None]:
    """The class prior in words, and the anchor (C,) in float64; None for a network trained with cross-entropy alone.

    Args:
        prior: "training" (the stored anchor), "balanced", ``"class=share,..."``, a JSON file, a mapping from class to
            share, or the shares in the order of the classes. Anything but "training" takes a model whose anchor
            estimates the class prior: ``anchor.center=prior``.
        card: the model's; names its objective, center and classes.

    Raises:
        ConfigError: a prior that is none, or that this model cannot be asked for.
    """
    as_trained = isinstance(prior, str) and prior == "training"
    if card["objective"] != "oat":
        if not as_trained:
            raise ConfigError(
                "this network was trained with cross-entropy alone: it has no anchor that a class prior could replace"
            )
        return "training", None
    if stored_anchor_C is None:
        raise CheckpointError("this model has no stored anchor")
    if as_trained:
        return "training", stored_anchor_C.double()
    if card["center"] != "prior":
        raise ConfigError(
            f"this model was trained with anchor.center={card['center']}, whose anchor is no class prior; another "
            "prior can be given to one trained with anchor.center=prior"
        )
    if isinstance(prior, str):
        return prior, class_prior(prior, card["classes"], stored_anchor_C)
    return "given", _given(prior, card["classes"])


def _given(prior: Mapping[str, float] | Sequence[float], classes: Sequence[str]) -> Tensor:
    """Shares (C,) that sum to one, of a mapping or a sequence."""
    if isinstance(prior, Mapping):
        if different := sorted(map(str, set(prior) ^ set(classes))):
            raise ConfigError(f"prior: must name every class once and no other; {different[0]!r} does not fit")
        prior = [prior[name] for name in classes]
    try:
        prior_C = torch.tensor([float(share) for share in prior], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"prior: must be numbers ({error})") from error
    if len(prior_C) != len(classes):
        raise ConfigError(f"prior: {len(prior_C)} shares for {len(classes)} classes")
    return _normalised(prior_C, "prior")


def class_prior(asked: str, classes: Sequence[str], stored_anchor_C: Tensor) -> Tensor:
    """The class prior (C,), float64, that a user asks for at test time.

    Args:
        asked: "training" (the stored anchor, which is its estimate), "balanced" (1/C), a JSON file, or
            ``class=share,...``. Shares need not sum to one; every class has one.

    Raises:
        ConfigError: saying what is wrong with `asked`.
    """
    if asked == "training":
        return stored_anchor_C.double()
    if asked == "balanced":
        return torch.full((len(classes),), 1 / len(classes), dtype=torch.float64)
    shares = _shares(asked, classes)
    missing = [name for name in classes if name not in shares]
    unknown = [name for name in shares if name not in set(classes)]
    if missing or unknown:
        what = (
            f"lacks {', '.join(missing[:5])}" if missing else f"names {', '.join(unknown[:5])}, no class of the model"
        )
        raise ConfigError(f"--prior {asked}: {what}; the classes are {', '.join(classes[:20])}")
    prior_C = torch.tensor([shares[name] for name in classes], dtype=torch.float64)
    return _normalised(prior_C, f"--prior {asked}")


def _normalised(prior_C: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(prior_C).all()) or bool((prior_C <= 0).any()):
        # Of a share of 0 the other classes' scores might all be negative: the class asked away would be the answer.
        raise ConfigError(f"{where}: shares must be numbers above 0")
    prior_C = prior_C / prior_C.max()  # the sum of large shares may be infinite
    return prior_C / prior_C.sum()


def _shares(asked: str, classes: Sequence[str]) -> dict[str, float]:
    """Class name to share, out of a JSON file (a mapping, or a list in the order of the classes) or a text."""
    problem = ConfigError(
        f"--prior {asked}: must be training, balanced, class=share,class=share,... or a JSON file that holds a mapping "
        "from class to share, or a list of shares in the order of the classes"
    )
    if asked.endswith(".json"):
        try:
            values = json.loads(Path(asked).read_text())
        except OSError as error:
            raise ConfigError(f"--prior {asked}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise problem from error
        if isinstance(values, list):
            if len(values) != len(classes):
                raise ConfigError(f"--prior {asked}: {len(values)} shares for {len(classes)} classes")
            values = dict(zip(classes, values, strict=True))
    else:
        pairs = [part.rpartition("=")[::2] for part in asked.split(",")]
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ConfigError(f"--prior {asked}: names a class twice")
    if not isinstance(values, Mapping):
        raise problem
    try:
        return {str(name).strip(): float(share) for name, share in values.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise problem from error
