"""Numbers of the training loop, kept on the device and reduced over the ranks only when a line is logged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from oat_dist.batch import Window
from oat_dist.distributed import World

__all__ = ["AnchorMean", "Meter"]


class AnchorMean:
    """Arithmetic mean of the training anchors of the epoch under way, in float64, and of the last whole epoch.

    Protocol "stored" freezes it into the checkpoint: the last whole epoch's, or before one has ended the running one.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # Two rows, (sum of anchors, their number): the epoch under way, and the last whole one of all ranks.
        self.running_X = torch.zeros(num_classes + 1, dtype=torch.float64, device=device)
        self.finished_X = torch.zeros_like(self.running_X)

    def add(self, anchors_GC: Tensor, counts_G: Tensor) -> None:
        """Add anchors of this rank; `counts_G` (bool) says which sets have samples at all."""
        self.running_X[:-1] += (anchors_GC * counts_G[:, None]).sum(dim=0)
        self.running_X[-1] += counts_G.sum()

    def end_epoch(self, world: World) -> None:
        self.finished_X = world.all_reduce(self.running_X.clone())
        self.running_X.zero_()

    def finished(self) -> list[float] | None:
        """The mean anchor (C) of the last whole epoch, the same on all ranks; None when no anchor was in it."""
        count = float(self.finished_X[-1])
        return (self.finished_X[:-1] / count).tolist() if count else None

    def value(self, world: World) -> Tensor | None:
        """The mean anchor (C,) in float64 on the CPU, the same on all ranks; None before the first anchor."""
        total_X = self.finished_X if self.finished_X[-1] > 0 else world.all_reduce(self.running_X.clone())
        return (total_X[:-1] / total_X[-1]).cpu() if total_X[-1] > 0 else None


@dataclass
class Interval:
    """What happened in `steps` steps since the last line. `first_bad` is the offset of the first non-finite one."""

    steps: int
    values: dict[str, Any]
    first_bad: int | None


class Meter:
    """Collects one interval of steps. Only `flush` waits for the device or talks to other ranks."""

    def __init__(self, world: World, capacity: int) -> None:
        self.world = world
        self._loss_L = torch.zeros(capacity, device=world.device)
        self._norm_L = torch.zeros(capacity, device=world.device)
        self._has_norm = False
        self._anchors_GC: Tensor | None = None
        self.fingerprint = 0  # of this rank since the start of training, modulo 2^64
        self.restart()

    def restart(self) -> None:
        """Begin an interval now."""
        self._steps = 0
        self._samples = 0
        self._data_seconds = 0.0
        self._started = time.perf_counter()
        self._loss_L.zero_()

    @property
    def steps(self) -> int:
        return self._steps

    def add_loss(self, loss: Tensor) -> None:
        """This rank's part of the loss of one micro-batch."""
        self._loss_L[self._steps] += loss.detach()

    def end_step(self, window: Window, data_seconds: float, anchors_GC: Tensor | None, norm: Tensor | None) -> None:
        if norm is not None:
            self._norm_L[self._steps] = norm.detach()
        self._has_norm = norm is not None
        self._anchors_GC = anchors_GC
        self._steps += 1
        self._samples += window.num_samples
        self._data_seconds += data_seconds
        self.fingerprint = (self.fingerprint + window.fingerprint) % 2**64

    def global_fingerprint(self) -> int:
        """Sum over the ranks modulo 2^64: int64 wraps around exactly so."""
        signed = self.fingerprint - 2**64 if self.fingerprint >= 2**63 else self.fingerprint
        total = self.world.all_reduce(torch.tensor([signed], dtype=torch.int64, device=self.world.device))
        return int(total.item()) % 2**64

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (an evaluation, a save) out of the time of this interval."""
        self._started += seconds

    def flush(self) -> Interval:
        """Reduce over the ranks, on all of them at once, and start the next interval."""
        # Each rank's loss carries a factor W: the average over ranks is the loss of the global batch.
        losses_L = self.world.all_reduce(self._loss_L[: self._steps].double()) / self.world.size
        bad = torch.nonzero(~torch.isfinite(losses_L)).flatten()
        seconds = max(time.perf_counter() - self._started, 1e-9)
        values: dict[str, Any] = {
            "loss": float(losses_L.mean()),
            "samples_per_s": float(f"{self._samples / seconds:.4g}"),
            "data_wait": round(self._data_seconds / seconds, 4),
            "seconds": round(seconds, 3),
            "memory_gb": round(memory_in_use(self.world.device) / 1e9, 3),
            "fingerprint": f"{self.global_fingerprint():016x}",
        }
        if self._has_norm:
            values["grad_norm"] = float(self._norm_L[: self._steps].mean())
        if self._anchors_GC is not None and len(self._anchors_GC):
            anchor_C = self._anchors_GC.double().mean(dim=0)
            values["anchor_min"] = float(anchor_C.min())
            values["anchor_max"] = float(anchor_C.max())
            values["anchor_entropy"] = float(-torch.xlogy(anchor_C, anchor_C).sum())
        self._anchors_GC = None
        steps = self._steps
        self.restart()
        return Interval(steps, values, int(bad[0]) if len(bad) else None)


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors of this process took since the last call, else what the process holds."""
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
