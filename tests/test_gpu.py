"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_run import TinyRun, tiny_run
from ranks import run_ranks
from training_checks import fit, fit_in_two, weights

from oat_dist import OATLoss
from oat_dist.anchor import CENTERS
from oat_dist.batch import Batch, Window
from oat_dist.checkpoint import find_checkpoint
from oat_dist.data.device_copy import windows_on_device
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import ShardSet
from oat_dist.distributed import World
from oat_dist.engine import start_engine
from oat_dist.evaluate import judge
from oat_dist.fp32 import exact_fp32
from oat_dist.models import build_model
from oat_dist.predict import load_network
from oat_dist.validation import network_outputs

__all__ = ["tiny_run"]

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


@pytest.mark.parametrize("scope", ["device", "global", "group"])
@pytest.mark.parametrize("center", CENTERS)
def test_the_loss_is_that_of_the_cpu_and_never_waits_for_the_device(center: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(37, 10, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(0, 10, (37,), generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        logits = logits_BC.detach().clone().to(device).requires_grad_()
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


def test_a_run_on_a_gpu_is_that_of_the_cpu_and_resumes_bit_by_bit(
    noisy_digits: dict[str, ShardSet], tmp_path: Path
) -> None:
    """fp32 without TensorFloat-32, deterministic: METHOD's bound to the CPU; stopped and resumed: the same bytes."""
    data = str(noisy_digits["train"].folder.parent)
    ten = ("deterministic=true", "pretrain_epochs=0", "epochs=1", "anchor.scope=global")
    engine = start_engine(threads=4, deterministic=True)
    assert engine.world.device.type == "cuda"
    try:
        with exact_fp32(engine.world.device):
            trainer = fit(engine, tmp_path, data, "gpu", *ten, "max_steps=10")
            assert next(trainer.network.parameters()).is_cuda
            fit(engine, tmp_path, data, "whole", *ten)
            fit_in_two(engine, tmp_path, data, "resumed", 17, *ten)
    finally:
        torch.use_deterministic_algorithms(False)
        engine.close()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "resumed")[name])
    run_ranks(1, "training_checks:fit_one", str(tmp_path), data, "cpu", [*ten, "max_steps=10"])  # ranks see no GPU
    torch.manual_seed(0)
    start, one = build_model("lightweight", 10).state_dict(), weights(tmp_path / "cpu")
    gpu = weights(tmp_path / "gpu")
    moved = sum(float((one[name] - start[name]).double().square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - gpu[name]).double().square().sum()) for name in one) ** 0.5
    print(f"GPU against CPU after ten steps: {apart / moved:.2g} of the move")
    assert moved > 0.01
    assert apart / moved <= 5e-5


def test_labels_do_not_depend_on_the_forward_batch_on_a_gpu(tiny_run: TinyRun) -> None:
    network, card, stored_C = load_network(find_checkpoint(tiny_run.folder))
    found = {}
    for device in ("cpu", "cuda"):
        world = World(device=torch.device(device))
        for batch_size in (1, 32, 100, 1000):
            outputs = network_outputs(
                network.to(device),
                tiny_run.test_split,
                Normalise(card["mean"], card["std"], world.device),
                world,
                pipeline=ImagePipeline(32),
                batch_size=batch_size,
            )
            assert outputs is not None
            found[device, batch_size] = judge(outputs, center="prior", floor=0.02, stored_anchor_C=stored_C)
    reference = found["cpu", 32]
    for where, evaluation in found.items():
        for name, result in evaluation.protocols.items():
            different = reference.ids_N[result.predicted_N != reference.protocols[name].predicted_N].tolist()
            assert set(different) <= set(result.ties) | set(reference.protocols[name].ties), (where, name)


def _window(number: int) -> Window:
    images_BHWC = torch.full((32, 64, 64, 3), number, dtype=torch.uint8).pin_memory()
    labels_B = torch.zeros(32, dtype=torch.int64)
    return Window((Batch(images_BHWC, labels_B, labels_B),), 32, 32, 0, 0, number)
