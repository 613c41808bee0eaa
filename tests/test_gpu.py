"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from oat_dist import OATLoss
from oat_dist.anchor import CENTERS
from oat_dist.batch import Batch, Window
from oat_dist.data.device_copy import windows_on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("scope", ["device", "global", "group"])
@pytest.mark.parametrize("center", CENTERS)
def test_the_loss_is_that_of_the_cpu_and_never_waits_for_the_device(center: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(37, 10, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(0, 10, (37,), generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        logits = logits_BC.to(device).requires_grad_()
        labels = labels_B.to(device)
        criterion = OATLoss(10, center, scope, group_size=8)
        criterion(logits, labels, 37).backward()  # the first call may load kernels
        logits.grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(logits, labels, 37).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[device] = logits.grad.cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-12, atol=1e-15)


def test_images_are_copied_to_the_device_ahead_and_unchanged() -> None:
    windows = [_window(number) for number in range(6)]
    device = torch.device("cuda")
    found = []
    for window in windows_on_device(iter(windows), device):
        torch.cuda._sleep(1_000_000)  # the device is busy with the window before
        found.append(window.batches[0].images_BHWC.float().sum())
    assert [value.item() for value in found] == [float(w.batches[0].images_BHWC.float().sum()) for w in windows]


def _window(number: int) -> Window:
    images_BHWC = torch.full((32, 64, 64, 3), number, dtype=torch.uint8).pin_memory()
    labels_B = torch.zeros(32, dtype=torch.int64)
    return Window((Batch(images_BHWC, labels_B, labels_B),), 32, 32, 0, 0, number)
