"""fp32 that is fp32, for answers that must not depend on the size of the forward batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["exact_fp32"]


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """On a GPU: no TensorFloat-32 (10 bits of mantissa, PyTorch's default for convolutions), no choice of algorithms by
    timing; as before afterwards. On the CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
