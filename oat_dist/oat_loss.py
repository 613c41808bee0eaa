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
            "prior" (softmax outputs without a second softmax, so that the anchor estimates the class prior).
        scope: whose batch the anchor is of: "device" (this rank's micro-batch), "global" (all ranks'), or "group"
            (every `group_size` consecutive samples of this rank; the last group may be short).
        group_size: samples of a group; used by scope "group" only.
        anchor_grad: whether gradient flows through the anchor; None means yes, but no for "prior".
        anchor_floor: eps in ``(1 - C eps) a + eps``; None means 0, but 0.2/C for "prior".
        process_group: the data-parallel group; None means all processes.

    Attributes:
        anchor: the last anchor, (C,), or (groups, C) for scope "group"; detached. None before the first call.
        statistics: the sums it came from; over all ranks for "global".

    In eval mode no collective is issued: anchor and mean are over the local batch.

    Raises:
        ValueError: impossible settings.
    """

    anchor: Tensor | None
    statistics: Statistics | None

    def __init__(
        self,
        num_classes: int,
        center: str = "probabilities",
        scope: str = "device",
        group_size: int = 32,
        anchor_grad: bool | None = None,
        anchor_floor: float | None = None,
        process_group: dist.ProcessGroup | None = None,
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
        self.anchor_grad = center != "prior" if anchor_grad is None else anchor_grad
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
        )


class _OATFunction(torch.autograd.Function):
    """Forward computes all that backward needs; backward is one linear pass over (B, C)."""

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
        if valid_B is not None:
            logits_BC = logits_BC.masked_fill(~valid_B[:, None], 0)
            labels_B = labels_B.masked_fill(~valid_B, 0)
        size = _set_size(settings, len(labels_B))

        # error_BC starts as z + 1 with the label entries taken out, and ends as z - t.
        mapped_BC = center_map(logits_BC, settings.center)
        error_BC = logits_BC + 1
        label_B1 = labels_B[:, None]
        labelled_B = error_BC.gather(1, label_B1).squeeze(1)
        error_BC.scatter_(1, label_B1, 0)
        if valid_B is not None:
            mapped_BC = mapped_BC.masked_fill(~valid_B[:, None], 0)
            error_BC.masked_fill_(~valid_B[:, None], 0)
            labelled_B = labelled_B * valid_B
        statistics, others = _statistics(settings, mapped_BC, error_BC, labelled_B, labels_B, valid_B)
        if settings.scope == "global" and world > 1:
            all_reduce_sum_(statistics.packed_GX, settings.process_group)
        anchor_GC = anchor_of(statistics.center_GC(), settings.center, settings.anchor_floor)

        samples = _num_samples(num_samples, statistics, settings, world)
        scale = 2 * world / (samples * settings.num_classes)
        if settings.anchor_grad:
            dl_da_GC = anchor_gradient(statistics, anchor_GC, scale)
            dl_dc_GC = center_gradient(dl_da_GC, anchor_GC, settings.center, settings.anchor_floor)
            share_GC = dl_dc_GC / statistics.count_G.clamp(min=1)[:, None]
        else:
            share_GC = None

        sets_B = torch.arange(len(labels_B), device=labels_B.device).div_(size, rounding_mode="floor")
        residual_B = labelled_B - 1 / anchor_GC[sets_B, labels_B]
        if valid_B is not None:
            residual_B = residual_B.masked_fill(~valid_B, 0)
        error_BC.scatter_(1, label_B1, residual_B[:, None])
        loss = (others + torch.dot(residual_B, residual_B)) * (scale / 2)

        softmax_BC = None if settings.center == "logits" or share_GC is None else mapped_BC
        ctx.save_for_backward(error_BC, scale, share_GC, softmax_BC, valid_B)
        ctx.size = size
        ctx.mark_non_differentiable(anchor_GC, statistics.packed_GX)
        return loss, anchor_GC, statistics.packed_GX

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        error_BC, scale, share_GC, softmax_BC, valid_B = ctx.saved_tensors
        scale = scale * grad
        if share_GC is None:
            gradient_BC = error_BC * scale
        else:
            share_XC = share_GC * grad
            if len(share_XC) > 1:
                share_XC = share_XC.repeat_interleave(ctx.size, dim=0)[: len(error_BC)]
            if softmax_BC is None:  # f = identity
                gradient_BC = torch.addcmul(share_XC, error_BC, scale)
                if valid_B is not None:
                    gradient_BC.masked_fill_(~valid_B[:, None], 0)
            else:  # J_f^T v = p * (v - <p, v>); rows of p that do not count are zero
                if len(share_XC) == 1:
                    inner_B1 = (softmax_BC @ share_XC[0])[:, None]
                else:
                    inner_B1 = (softmax_BC * share_XC).sum(dim=1, keepdim=True)
                gradient_BC = (share_XC - inner_B1).mul_(softmax_BC).addcmul_(error_BC, scale)
        return gradient_BC, None, None, None, None


def _set_size(settings: OATLoss, samples: int) -> int:
    return settings.group_size if settings.scope == "group" else max(samples, 1)


def _statistics(
    settings: OATLoss,
    mapped_BC: Tensor,
    others_BC: Tensor,
    labelled_B: Tensor,
    labels_B: Tensor,
    valid_B: Tensor | None,
) -> tuple[Statistics, Tensor]:
    """The sums of this rank and the sum of squares of `others_BC`: z + 1 without the label entries.

    `labelled_B` holds those entries. Rows that do not count are zero in all three.
    """
    samples, classes = mapped_BC.shape
    size = _set_size(settings, samples)
    sets = -(-samples // size) if settings.scope == "group" else 1
    packed_GX = mapped_BC.new_zeros(sets, 3 * classes + 2)
    ones_B = torch.ones_like(labelled_B) if valid_B is None else valid_B.to(labelled_B.dtype)
    start_B = labels_B
    if sets > 1:
        rows_B = torch.arange(samples, device=labels_B.device).div_(size, rounding_mode="floor")
        start_B = labels_B + rows_B * packed_GX.shape[1]
    flat_X = packed_GX.view(-1)
    flat_X.index_add_(0, start_B + classes, labelled_B)
    flat_X.index_add_(0, start_B + 2 * classes, ones_B)
    if sets == 1:
        # A dot product reads the (B, C) buffer once, where square().sum() would write and read another.
        others = torch.dot(others_BC.view(-1), others_BC.view(-1))
        packed_GX[0, :classes] = mapped_BC.sum(dim=0)
        packed_GX[0, -2] = others + torch.dot(labelled_B, labelled_B)
        packed_GX[0, -1] = ones_B.sum()
    else:
        others_B = others_BC.square().sum(dim=1)
        others = others_B.sum()
        packed_GX[:, :classes] = segment_sum(mapped_BC, size)
        packed_GX[:, -2] = segment_sum(others_B + labelled_B.square(), size)
        packed_GX[:, -1] = segment_sum(ones_B, size)
    return Statistics(packed_GX), others


def _num_samples(num_samples: int | Tensor | None, statistics: Statistics, settings: OATLoss, world: int) -> Tensor:
    """N as a tensor on the device (at least 1, so that an update without samples has loss 0, not NaN)."""
    packed_GX = statistics.packed_GX
    if num_samples is not None:
        count = torch.as_tensor(num_samples, dtype=packed_GX.dtype, device=packed_GX.device)
    else:
        count = packed_GX[:, -1].sum()
        if settings.scope != "global" and world > 1:
            all_reduce_sum_(count, settings.process_group)
    return count.clamp(min=1)
