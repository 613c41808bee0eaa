"""The processes of a run, and every raw collective: nothing else in the project issues one.

`counts` records how many collectives of each kind this process has issued, so that tests can hold the promise
"one per global anchor, none otherwise". A barrier is an all-reduce of success, so that one failing rank makes all
of them fail instead of hang.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from oat_dist.errors import OatError

__all__ = ["World", "all_reduce_sum_", "counts", "group_size"]

T = TypeVar("T")
counts: Counter[str] = Counter()


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in `group` (default: all); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the processes of `group`, in place. No autograd: see `oat_dist.oat_loss` for why."""
    if group_size(group) > 1:
        counts["all_reduce"] += 1
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


@dataclass(frozen=True)
class World:
    """This process among all of the run: `rank` of `size`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce over all ranks, in place; `op` is "sum", "min" or "max"."""
        if self.size > 1:
            counts["all_reduce"] += 1
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
        return tensor

    def all_agree(self, success: bool) -> bool:
        """A barrier: True on every rank when `success` is True on all of them, else False on every rank."""
        if self.size == 1:
            return success
        flag = torch.tensor([int(success)], device=self.device, dtype=torch.int32)
        return bool(self.all_reduce(flag, "min").item())

    def maximum(self, values: list[int]) -> list[int]:
        """The largest of each value over all ranks. Counted apart: how often ranks agree depends on the clock."""
        if self.size == 1:
            return values
        counts["maximum"] += 1
        tensor = torch.tensor(values, device=self.device, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def together(self, action: Callable[..., T], *arguments: Any) -> T:
        """Run `action` on every rank; when it fails on one, raise that error on all of them instead of hanging.

        Raises:
            OatError: the first rank's problem, marked as raised everywhere.
        """
        problem: OatError | None = None
        result = None
        try:
            result = action(*arguments)
        except OatError as error:
            problem = error
        except OSError as error:
            problem = OatError(f"{error.filename or 'a file'}: {error.strerror}; mend that and start again")
        if not self.all_agree(problem is None):
            problem = next(p for p in self.gather_objects(problem) if p is not None)
            problem.everywhere = True
            raise problem
        return cast(T, result)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` by rank 0's, in place."""
        if self.size > 1:
            counts["broadcast"] += 1
            dist.broadcast(tensor, src=0)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable facts of every rank, by rank, on every rank. Ours only: peers are this very program."""
        if self.size == 1:
            return [value]
        counts["all_gather_object"] += 1
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Concatenate the rows of every rank (any number each) in rank order on rank 0, on the CPU; None elsewhere."""
        if self.size == 1:
            return rows.cpu()
        sizes = self.gather_objects(rows.shape[0])
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]), device=self.device)
        padded[: rows.shape[0]] = rows.to(self.device)
        counts["gather"] += 1
        parts = [torch.empty_like(padded) for _ in sizes] if self.is_main else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return torch.cat([part[:size].cpu() for part, size in zip(parts, sizes, strict=True)])
