"""From the outputs of a trained network to answers about single images: scores, labels, probabilities.

What `predict`, exported models and the protocols "stored", "balanced" and "given" share. An image's answer depends on
nothing but that image.

With a fixed anchor `a` the optimum of the OAT loss is ``s = a * (z + 1) = p(y|x)``, so the probabilities are the
Euclidean projection of the scores onto the simplex: it keeps the order of the classes and never worsens the Brier
score. Anchors through which the gradient flowed (the default of training) leave a bias in s. A network trained with
cross-entropy alone has ``s = z`` and softmax probabilities.

Probabilities are called calibrated only where a temperature T was fitted on held-out data. Then they are proportional
to ``max(s, 0.1 / C) ** (1 / T)``, which is to estimates of probabilities what ``softmax(z / T)`` is to logits.
(``softmax(s / T)`` would take estimates for logits: measured, it made them worse, see docs/answers.md.)

Under the center "prior" the anchor estimates the class prior of training, and ``z + 1`` is the lift of a class over it:
any other prior at test time takes the anchor's place (`class_prior`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from oat_dist.anchor import invert
from oat_dist.errors import ConfigError

__all__ = ["AnswerHead", "class_prior", "probabilities_of", "project_to_simplex", "temperable"]


def project_to_simplex(scores_BC: Tensor) -> Tensor:
    """The nearest probabilities (B, C) to scores (B, C) in the Euclidean sense; the order of classes is kept."""
    sorted_BC = scores_BC.sort(dim=1, descending=True).values
    excess_BC = sorted_BC.cumsum(dim=1) - 1
    rank_C = torch.arange(1, scores_BC.shape[1] + 1, device=scores_BC.device, dtype=scores_BC.dtype)
    support_B1 = (sorted_BC * rank_C > excess_BC).sum(dim=1, keepdim=True)
    threshold_B1 = excess_BC.gather(1, support_B1 - 1) / support_B1
    return (scores_BC - threshold_B1).clamp(min=0)


def temperable(scores_BC: Tensor, softmax: bool) -> Tensor:
    """What a temperature divides: the logits of cross-entropy, the logarithm of OAT's scores (B, C).

    Scores may be zero or less; a tenth of an even share counts as the least, so that a logarithm always exists.
    """
    return scores_BC if softmax else scores_BC.clamp(min=0.1 / scores_BC.shape[1]).log()


def probabilities_of(scores_BC: Tensor, *, softmax: bool, temperature: float | None = None) -> Tensor:
    """Probabilities (B, C) of scores (B, C).

    Args:
        softmax: the scores are the logits of a network trained with cross-entropy alone.
        temperature: as fitted on held-out data; None: not calibrated.
    """
    if temperature is not None:
        return (temperable(scores_BC, softmax) / temperature).softmax(dim=1)
    return scores_BC.softmax(dim=1) if softmax else project_to_simplex(scores_BC)


class AnswerHead(nn.Module):
    """Scores and probabilities (B, C) each, in the precision of the logits (B, C).

    Args:
        anchor_C: the frozen anchor, or a class prior in its place; None for a network trained with cross-entropy alone.
        temperature: as fitted on held-out data; None: not calibrated.
    """

    anchor_C: Tensor | None

    def __init__(self, anchor_C: Tensor | None, temperature: float | None = None) -> None:
        super().__init__()
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"a temperature is a positive number, not {temperature}")
        self.register_buffer("anchor_C", None if anchor_C is None else anchor_C.detach().clone().double())
        self.temperature = temperature

    def forward(self, logits_BC: Tensor) -> tuple[Tensor, Tensor]:
        scores_BC = logits_BC if self.anchor_C is None else invert(logits_BC, self.anchor_C.to(logits_BC.dtype))
        return scores_BC, probabilities_of(scores_BC, softmax=self.anchor_C is None, temperature=self.temperature)


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
    if not bool(torch.isfinite(prior_C).all()) or bool((prior_C < 0).any()) or float(prior_C.sum()) <= 0:
        raise ConfigError(f"--prior {asked}: shares must be numbers of at least 0, not all of them 0")
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
        values = dict(part.rpartition("=")[::2] for part in asked.split(","))
    if not isinstance(values, Mapping):
        raise problem
    try:
        return {str(name).strip(): float(share) for name, share in values.items()}
    except (TypeError, ValueError) as error:
        raise problem from error
