"""`OATLoss`: the OAT loss whose value and gradient are exact on any number of processes.

The loss of every sample depends on the anchor, and so on the whole batch. Differentiating through an all-reduce is
where distributed implementations go wrong (a bare all-reduce inside autograd is 8 to 12 % off). Here the gradient,
also the part through the anchor, is known in closed form from 3C + 2 sums over the anchor set, so a global anchor
costs ONE collective in forward and none in backward:

    dL/da_k = 2/(N C) (S_k / a_k^2 - n_k / a_k^3)                                 (attached only)
    dL/dc   = a (dL/da - <a, dL/da>)                                              ("prior": dL/da)
    dL/dz_i = 2/(N C) (z_i + 1 - onehot_i / a) + J_f(z_i)^T dL/dc / B_a

Data-parallel engines average gradients over W ranks, so each rank's loss and gradient carry a factor W.
Shapes: B samples on this rank, C classes, G anchor sets on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oat_dist.anchor import (
    FIXED,
    Statistics,
    anchor_gradient,
    anchor_of,
    center_gradient,
    center_map,
    default_floor,
    segment_sum,
)
from oat_dist.distributed import all_reduce_sum_, group_size

__all__ = ["SCOPES", "OATLoss"]

SCOPES = ("device", "global", "group")


class OATLoss(nn.Module):
    """Mean squared error to the percentage change of the label from the anchor (paper Eqs. 1 to 3).

    Args:
        num_classes: C.
        center: what is averaged: "probabilities" (softmax outputs, the authors' code), "logits" (paper Eq. 1), or
            "prior" (softmax outputs without a second softmax, so that the anchor estimates the class prior). Controls:
            "uniform" (a fixed anchor 1/C) and "one_hot" (1: MSE of z + 1 to the one-hot label).
        scope: whose batch the anchor is of: "device" (this rank's micro-batch), "global" (all ranks'), or "group"
            (every `group_size` consecutive samples of this rank; the last group may be short).
        group_size: samples of a group; used by scope "group" only.
        anchor_grad: whether gradient flows through the anchor; None means yes, but no for "prior", for the controls
            and for a running mean.
        anchor_floor: eps in ``(1 - C eps) a + eps``; None means 0, but 0.2/C for "prior".
        momentum: of a running-mean anchor: every step back counts for so much less. 0: no memory. Only without
            gradient, and with scope "global", so that every rank keeps the same mean. Sets without samples leave it as
            it is, and so does eval mode.
        process_group: the data-parallel group; None means all processes.

    Attributes:
        anchor: the last anchor, (C,), or (groups, C) for scope "group"; detached. None before the first call.
        statistics: the sums it came from; over all ranks for "global".
        running_X: with `momentum`, weighted sum of anchors (C) and of their weights (1): part of the state of a
            training. None before the first call.

    In eval mode no collective is issued: anchor and mean are over the local batch.

    Raises:
        ValueError: impossible settings.
    """

    anchor: Tensor | None
    statistics: Statistics | None
    running_X: Tensor | None

    def __init__(
        self,
        num_classes: int,
        center: str = "probabilities",
        scope: str = "device",
        group_size: int = 32,
        anchor_grad: bool | None = None,
        anchor_floor: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {group_size}")
        self.num_classes = num_classes
        self.center = center
        self.scope = scope
        self.group_size = group_size
        self.anchor_floor = default_floor(center, num_classes, anchor_floor)
        detached = center == "prior" or center in FIXED or momentum > 0
        self.anchor_grad = not detached if anchor_grad is None else anchor_grad
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in 0 <= momentum < 1, not {momentum}")
        if momentum and (self.anchor_grad or scope != "global" or center in FIXED):
            raise ValueError(
                "a running-mean anchor needs scope global, anchor_grad false and a center that is averaged"
            )
        if self.anchor_grad and center in FIXED:
            raise ValueError(f"no gradient flows through the fixed anchor of center {center}")
        self.momentum = momentum
        self.running_X = None
        self.process_group = process_group
        self.anchor = None
        self.statistics = None

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        num_samples: int | Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The loss of this rank's samples, times W, so that the average over W ranks is the mean over all.

        Args:
            logits: raw network outputs (B, C); B may be 0 and may differ between ranks.
            labels: class indices (B,).
            num_samples: N, all samples of this optimizer update over ranks and micro-batches. None: this call is
                the whole update; N is then summed over the ranks ("global" has it from its one collective, the
                other scopes pay one all-reduce of one number).
            valid: which samples count (B,), bool; the others take no part in anchor, loss and N. None: all.

        Returns:
            A scalar in fp32 (float64 for float64 logits).
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must have shape (B, {self.num_classes}), not {tuple(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must have shape ({logits.shape[0]},), not {tuple(labels.shape)}")
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels must be class indices, not {labels.dtype}")
        if logits.dtype != torch.float64:
            logits = logits.float()
        # Autocast must not turn the statistics into bf16.
        with torch.autocast(logits.device.type, enabled=False):
            loss, self.anchor, packed = _OATFunction.apply(logits, labels.long(), valid, num_samples, self)
        if self.scope != "group":
            self.anchor = self.anchor[0]
        self.statistics = Statistics(packed)
        return loss

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.scope == "group" else ""
        return (
            f"num_classes={self.num_classes}, center={self.center!r}, scope={self.scope!r}{group}, "
            f"anchor_grad={self.anchor_grad}, anchor_floor={self.anchor_floor:g}"
            + (f", momentum={self.momentum:g}" if self.momentum else "")
        )

    def running(self, anchor_1C: Tensor, count_1: Tensor) -> Tensor:
        """The running mean (1, C) with this anchor taken in: ``sum_i m^(t-i) a_i / sum_i m^(t-i)``."""
        before_X = (
            anchor_1C.new_zeros(anchor_1C.shape[1] + 1) if self.running_X is None else self.running_X.to(anchor_1C)
        )
        if self.training:
            mixed_X = torch.lerp(torch.cat([anchor_1C[0], torch.ones_like(count_1)]), before_X, self.momentum)
            before_X = self.running_X = torch.where(count_1 > 0, mixed_X, before_X)
        return torch.where(before_X[-1] > 0, before_X[:-1] / before_X[-1], anchor_1C)


class _OATFunction(torch.autograd.Function):
    """Forward computes all that backward needs; backward is one linear pass over (B, C).

    Small batches are bound by the number of operations, large ones by passes over (B, C): both are kept few.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BC: Tensor,
        labels_B: Tensor,
        valid_B: Tensor | None,
        num_samples: int | Tensor | None,
        settings: OATLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        world = group_size(settings.process_group) if settings.training else 1
        center, floor = settings.center, settings.anchor_floor
        if valid_B is not None:
            logits_BC = logits_BC.masked_fill(~valid_B[:, None], 0)
            labels_B = labels_B.masked_fill(~valid_B, 0)

        # error_BC starts as z + 1 with the label entries taken out, and ends as z - t.
        mapped_BC = center_map(logits_BC, center)
        error_BC = logits_BC + 1
        label_B1 = labels_B[:, None]
        labelled_B = error_BC.gather(1, label_B1)[:, 0]
        error_BC.scatter_(1, label_B1, 0)
        if valid_B is not None:
            mapped_BC = mapped_BC.masked_fill(~valid_B[:, None], 0)
            error_BC.masked_fill_(~valid_B[:, None], 0)
            labelled_B = labelled_B * valid_B

        sets_B = _sets(settings, labels_B)
        statistics, others = _statistics(settings, mapped_BC, error_BC, labelled_B, labels_B, valid_B, sets_B)
        if settings.scope == "global" and world > 1:
            all_reduce_sum_(statistics.packed_GX, settings.process_group)
        anchor_GC = anchor_of(statistics.center_GC(), center, floor)
        if settings.momentum:
            anchor_GC = settings.running(anchor_GC, statistics.count_G)
        scale = _scale(num_samples, statistics, settings, world)

        share_GC = None
        if settings.anchor_grad:
            dl_da_GC = anchor_gradient(statistics, anchor_GC, scale)
            dl_dc_GC = center_gradient(dl_da_GC, anchor_GC, center, floor)
            share_GC = dl_dc_GC / statistics.count_G.clamp(min=1)[:, None]

        residual_B = (
            labelled_B - (anchor_GC[0, labels_B] if sets_B is None else anchor_GC[sets_B, labels_B]).reciprocal()
        )
        if valid_B is not None:
            residual_B = residual_B.masked_fill(~valid_B, 0)
        error_BC.scatter_(1, label_B1, residual_B[:, None])
        loss = (others + torch.dot(residual_B, residual_B)) * (scale * 0.5)

        softmax_BC = None if center == "logits" or share_GC is None else mapped_BC
        ctx.save_for_backward(error_BC, share_GC, softmax_BC, valid_B, sets_B)
        ctx.scale = scale
        ctx.mark_non_differentiable(anchor_GC, statistics.packed_GX)
        ctx.set_materialize_grads(False)
        return loss, anchor_GC, statistics.packed_GX

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        error_BC, share_GC, softmax_BC, valid_B, sets_B = ctx.saved_tensors
        scale = grad * ctx.scale
        if share_GC is None:
            gradient_BC = error_BC * scale
        else:
            share_XC = share_GC * grad  # X: one row for all samples, or one for each
            if sets_B is not None:
                share_XC = share_XC[sets_B]
            if softmax_BC is None:  # f = identity
                gradient_BC = torch.addcmul(share_XC, error_BC, scale)
                if valid_B is not None:
                    gradient_BC.masked_fill_(~valid_B[:, None], 0)
            else:  # J_f^T v = p * (v - <p, v>); rows of p that do not count are zero
                if sets_B is None:
                    inner_B1 = softmax_BC @ share_XC.T
                else:
                    inner_B1 = (softmax_BC * share_XC).sum(dim=1, keepdim=True)
                gradient_BC = (share_XC - inner_B1).mul_(softmax_BC).addcmul_(error_BC, scale)
        return gradient_BC, None, None, None, None


def _sets(settings: OATLoss, labels_B: Tensor) -> Tensor | None:
    """Which anchor set each sample belongs to (B,); None when one set holds all of them."""
    if settings.scope != "group" or 0 < len(labels_B) <= settings.group_size:
        return None
    return torch.arange(len(labels_B), device=labels_B.device).div_(settings.group_size, rounding_mode="floor")


def _statistics(
    settings: OATLoss,
    mapped_BC: Tensor,
    others_BC: Tensor,
    labelled_B: Tensor,
    labels_B: Tensor,
    valid_B: Tensor | None,
    sets_B: Tensor | None,
) -> tuple[Statistics, Tensor]:
    """The sums of this rank, and the sum of squares of `others_BC`: z + 1 without the label entries.

    `labelled_B` holds those entries. Rows that do not count are zero in all three.
    """
    samples, classes = mapped_BC.shape
    sets = 1 if sets_B is None else -(-samples // settings.group_size)
    packed_GX = mapped_BC.new_zeros(sets, 3 * classes + 2)
    ones_B = torch.ones_like(labelled_B) if valid_B is None else valid_B.to(labelled_B.dtype)
    start_B = labels_B if sets_B is None else torch.add(labels_B, sets_B, alpha=packed_GX.shape[1])
    flat_X = packed_GX.view(-1)
    flat_X[classes:].index_add_(0, start_B, labelled_B)
    flat_X[2 * classes :].index_add_(0, start_B, ones_B)
    if sets_B is None:
        # A dot product reads the (B, C) buffer once, where square().sum() would write and read another.
        others = torch.dot(others_BC.view(-1), others_BC.view(-1))
        torch.sum(mapped_BC, dim=0, out=flat_X[:classes])
        flat_X[-2] = others + torch.dot(labelled_B, labelled_B)
        if valid_B is None:
            flat_X[-1:].fill_(samples)  # by assignment a number would be copied to the device, and waited for
        else:
            flat_X[-1] = ones_B.sum()
    else:
        others_B = others_BC.square().sum(dim=1)
        others = others_B.sum()
        packed_GX[:, :classes] = segment_sum(mapped_BC, settings.group_size)
        packed_GX[:, -2] = segment_sum(others_B + labelled_B.square(), settings.group_size)
        packed_GX[:, -1] = segment_sum(ones_B, settings.group_size)
    return Statistics(packed_GX), others


def _scale(num_samples: int | Tensor | None, statistics: Statistics, settings: OATLoss, world: int) -> Tensor | float:
    """``2 W / (N C)``. N is at least 1, so that an update without samples has loss 0, not NaN."""
    factor = 2 * world / settings.num_classes
    if isinstance(num_samples, int):
        return factor / max(num_samples, 1)
    if num_samples is not None:
        count = num_samples.to(statistics.packed_GX)
    else:
        count = statistics.count_G.sum()
        if settings.scope != "global" and world > 1:
            all_reduce_sum_(count, settings.process_group)
    return factor / count.clamp(min=1)
