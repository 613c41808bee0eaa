"""model.json of a checkpoint: what a network is, and what its answers are made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oat_dist.anchor import default_floor
from oat_dist.config import Config
from oat_dist.data.index import ShardSet
from oat_dist.data.stream import StreamSet
from oat_dist.errors import CheckpointError

__all__ = ["judging", "model_card"]


def model_card(config: Config, train_set: ShardSet | StreamSet, objective: str) -> dict[str, Any]:
    """All that is needed to use the network without the run's configuration.

    Args:
        objective: of the last step: "oat" or "cross_entropy".
    """
    classes = train_set.classes
    card = {
        "name": config.model.name,
        "classes": classes,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "crop": config.data.eval_crop,
        "crop_fraction": config.data.crop_fraction,
        "objective": objective,
        "center": config.anchor.center,
        "floor": default_floor(config.anchor.center, len(classes), config.anchor.floor),
        **({} if config.optim.ema is None else {"ema": config.optim.ema}),
    }
    # Classes weighted inversely to their shares are learnt as logits adjusted by the whole log of the share are.
    adjusted = 1.0 if config.loss.class_weights == "balanced" else config.loss.logit_adjustment
    if isinstance(train_set, ShardSet) and (adjusted or _uneven(train_set.manifest.class_counts)):
        card |= {"class_shares": train_set.class_shares, "adjusted": adjusted}
    return card


def _uneven(counts: Sequence[int]) -> bool:
    """Whether it makes a difference that classes are asked for as if they were equally frequent."""
    return max(counts) >= 2 * min(counts)


def judging(card: dict[str, Any]) -> dict[str, Any]:
    """What `oat_dist.evaluate.judge` has to know of a network: its center, floor, shares_C and adjusted.

    Raises:
        CheckpointError: class shares that are none.
    """
    try:
        shares = card.get("class_shares")
        shares_C = None if shares is None else torch.tensor([float(share) for share in shares], dtype=torch.float64)
        adjusted = float(card.get("adjusted", 0.0))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"model.json: damaged, class_shares or adjusted are no numbers ({error})") from error
    if shares_C is not None and (len(shares_C) != len(card["classes"]) or not bool((shares_C >= 0).all())):
        raise CheckpointError(f"model.json: damaged, class_shares are not {len(card['classes'])} shares")
    if shares_C is not None and 0 in shares_C:
        shares_C = None  # of a class that was never seen nothing can be asked
    center = card["center"] if card["objective"] == "oat" else None
    return {"center": center, "floor": card["floor"], "shares_C": shares_C, "adjusted": adjusted}
