"""Our training step over a bare PyTorch loop, and our loss over ``F.cross_entropy``: ratios of process CPU time, or of
the time until a GPU has done the work.

    make bench          (or: python benchmarks/step.py [--repeats 15])

The two sides of a ratio run in turn, A B A B ..., in one process with one thread, and the median over the repeats is
printed with the smallest and largest: absolute times on a shared machine mean little, ratios side by side do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist import OATLoss
from oat_dist.anchor import CENTERS, anchor_targets, batch_anchor
from oat_dist.batch import Window
from oat_dist.config import load_config
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES
from oat_dist.engine import start_engine
from oat_dist.engine.launcher import is_true
from oat_dist.models import Lightweight
from oat_dist.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not is_true("ACCELERATE_USE_CPU") else "cpu")
Side = Callable[[], object]
Loss = Callable[[Tensor, Tensor], Tensor]


def ratios(sides: dict[str, Side], calls: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side over the first one's, repeat by repeat."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        seconds = {}
        for name, side in sides.items():
            started = _now()
            for _ in range(calls):
                side()
            seconds[name] = _now() - started
        if repeat:  # the first one warms up
            base = seconds[next(iter(sides))]
            for name, value in seconds.items():
                found[name].append(value / base)
    return found


def _now() -> float:
    """Seconds; on a GPU once it is done, since the CPU only asks for the work."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def show(title: str, found: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    for name, values in found.items():
        print(f"  {name:<34} {statistics.median(values):6.3f}   ({min(values):.3f} to {max(values):.3f})")


def naive(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """OAT with center "probabilities" as most would write it, by autograd."""
    return F.mse_loss(logits_BC, anchor_targets(labels_B, batch_anchor(logits_BC)))


def losses(repeats: int) -> None:
    for batch, classes in ((32, 10), (256, 1000), (1024, 1000), (32, 21841)):
        logits_BC = torch.randn(batch, classes, device=DEVICE, requires_grad=True)
        labels_B = torch.randint(0, classes, (batch,), device=DEVICE)
        compared: dict[str, Loss] = {"F.cross_entropy": F.cross_entropy}
        for center in CENTERS:
            compared[f"OATLoss {center}"] = OATLoss(classes, center)
        compared["naive autograd probabilities"] = naive
        sides = {name: _forward_backward(loss, logits_BC, labels_B) for name, loss in compared.items()}
        calls = max(3, min(300, 3_000_000 // (batch * classes)))
        show(f"loss, forward and backward, {batch} x {classes} (F.cross_entropy = 1)", ratios(sides, calls, repeats))


def _forward_backward(loss: Loss, logits_BC: Tensor, labels_B: Tensor) -> Side:
    def side() -> None:
        logits_BC.grad = None
        loss(logits_BC, labels_B).backward()

    return side


def steps(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = SOURCES["digits"]("-", splits={}, seed=0)
        write_splits(plan.splits, Path(folder, "digits"), classes=plan.classes)
        config = Path(folder, "config.yaml")
        config.write_text(
            f"{{output_dir: {folder}/run, data: {{path: {folder}/digits}}, log: {{every_steps: 1000000}}}}"
        )
        engine = start_engine(threads=1)
        for phase, pretrain in (("cross-entropy", 100), ("OAT", 0)):
            settings = [f"pretrain_epochs={pretrain}"]
            trainer = Trainer(load_config(config, settings), engine)
            with_ema = Trainer(load_config(config, [*settings, "optim.ema=0.999"]), engine)
            window = next(trainer.data.loader.windows(0, 1))
            sides = {
                "bare PyTorch loop": _bare(window, trainer, phase),
                f"Trainer, {phase}": _ours(window, trainer),
                f"Trainer, {phase}, optim.ema": _ours(window, with_ema),
            }
            show(
                f"step, {phase}, lightweight net, batch 32, without the loader (bare = 1)", ratios(sides, 200, repeats)
            )
        engine.close()


def _bare(window: Window, trainer: Trainer, phase: str) -> Side:
    """What one would write by hand with the same loss and the same normalisation on the device."""
    model = Lightweight(10).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    criterion: Loss = OATLoss(10) if phase == "OAT" else F.cross_entropy
    batch = window.batches[0]
    images_BHWC, labels_B, normalise = batch.images_BHWC, batch.labels_B.to(DEVICE), trainer.data.normalise

    def step() -> None:
        loss = criterion(model(normalise(images_BHWC)), labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _ours(window: Window, trainer: Trainer) -> Side:
    """A step as `Trainer` takes it, with its metrics."""

    def step() -> None:
        if trainer.meter.steps == trainer.steps_per_epoch:
            trainer.meter.flush()  # as at the end of an epoch
        norm = trainer.train_step(window)
        trainer.meter.end_step(window, 0.0, trainer.objective.anchors(), norm)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="counted repeats of each side (default 15)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = "one CPU thread" if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, median (smallest to largest) of {repeats} repeats")
    steps(repeats)
    losses(repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
