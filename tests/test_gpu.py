"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from oat_dist import OATLoss
from oat_dist.anchor import CENTERS

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
