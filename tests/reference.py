"""A plain transcription of METHOD's formulas, for one process and autograd: what everything else is measured against.

Nothing here is imported from the package but the formulas that are tested by themselves in test_anchor.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def plain_anchor(logits_BC: Tensor, center: str, floor: float) -> Tensor:
    classes = logits_BC.shape[1]
    if center == "logits":
        anchor_C = torch.softmax(logits_BC.mean(dim=0), dim=0)
    elif center == "probabilities":
        anchor_C = torch.softmax(torch.softmax(logits_BC, dim=1).mean(dim=0), dim=0)
    elif center == "uniform":
        anchor_C = torch.full((classes,), 1 / classes, dtype=logits_BC.dtype)
    elif center == "one_hot":
        anchor_C = torch.ones(classes, dtype=logits_BC.dtype)
    else:
        anchor_C = torch.softmax(logits_BC, dim=1).mean(dim=0)
    return (1 - classes * floor) * anchor_C + floor


def plain_loss(
    logits_BC: Tensor, labels_B: Tensor, sets: list[list[int]], center: str, attached: bool, floor: float, samples: int
) -> Tensor:
    """L = 1/(N C) sum (z - t)^2 with one anchor per list of rows in `sets`; rows in no set do not count."""
    total = logits_BC.new_zeros(())
    classes = logits_BC.shape[1]
    for rows in sets:
        if not rows:
            continue
        logits = logits_BC[rows]
        anchor_C = plain_anchor(logits, center, floor)
        if not attached:
            anchor_C = anchor_C.detach()
        onehot_BC = torch.eye(classes, dtype=logits.dtype)[labels_B[rows]]
        targets_BC = onehot_BC / anchor_C - 1
        total = total + ((logits - targets_BC) ** 2).sum()
    return total / (samples * classes)


def small_net(inputs: int, classes: int, dtype: torch.dtype) -> nn.Module:
    """No BatchNorm, no dropout; the same weights whenever it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, classes))
    return net.to(dtype)


def parameters_of(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in net.parameters()])


def distance(theta: Tensor, reference: Tensor, start: Tensor) -> float:
    """|theta - reference| / |reference - start|: the bound's measure, norms over all parameters."""
    return float((theta - reference).norm() / (reference - start).norm())
