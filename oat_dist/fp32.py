"""fp32 that is fp32, for answers that must not depend on the size of the forward batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["exact_fp32"]


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """On a GPU: no TensorFloat-32 (10 bits of mantissa, PyTorch's default for convolutions), no choice of algorithms by
    timing; as before afterwards. On the CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before PyTorch 2.9
        before = torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = False
            with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return
    # Its newer names alone: to read an old one where a program has set a new one is an error there.
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    precisions, choices = [place.fp32_precision for place in places], (cudnn.benchmark, cudnn.deterministic)
    try:
        for place in places:
            place.fp32_precision = "ieee"
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = choices
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision
