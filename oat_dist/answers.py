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
any other prior at test time takes the anchor's place (`oat_dist.priors`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oat_dist.anchor import invert

__all__ = ["AnswerHead", "probabilities_of", "project_to_simplex", "temperable"]


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
