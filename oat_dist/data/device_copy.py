"""Images on their way to a GPU: copied on a stream of their own while the network still works on the window before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from oat_dist.batch import Window

__all__ = ["windows_on_device"]


def windows_on_device(windows: Iterator[Window], device: torch.device) -> Iterator[Window]:
    """The same windows, their images on `device`. On the CPU: as they are.

    The caller queues kernels and asks for the next window long before they have run, so the copy overlaps with them.
    Images should lie in page-locked memory (`BatchBuilder.pin_memory`); otherwise the copies are exact but wait.
    """
    if device.type != "cuda":
        yield from windows
        return
    stream = torch.cuda.Stream(device)

    def copied(images_BHWC: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            return images_BHWC.to(device, non_blocking=True)

    for window in windows:
        batches = [dataclasses.replace(b, images_BHWC=copied(b.images_BHWC)) for b in window.batches]
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for batch in batches:
            batch.images_BHWC.record_stream(current)  # its memory is not given away before this stream is done with it
        yield dataclasses.replace(window, batches=tuple(batches))
