"""A run that goes on with another number of ranks: 4, then 2, then 3, at a global batch none of them divides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_checks import parameters
from ranks import run_ranks
from test_training import packed, records
from training_checks import weights

from oat_dist.data.index import ShardSet
from oat_dist.models import build_model


def test_four_then_two_then_three_ranks_are_one_run(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """DDP, global anchors, neither BatchNorm nor dropout: the same samples in the same order, the same losses and
    weights to rounding, as on one process that nobody disturbed."""
    for world, stop in ((4, 5), (2, 9), (3, 15)):
        run_ranks(world, "stopping_checks:until", str(tmp_path), packed(digits), "moved", stop)
    run_ranks(1, "stopping_checks:until", str(tmp_path), packed(digits), "calm", 15)
    run_ranks(3, "stopping_checks:until", str(tmp_path), packed(digits), "other", 15, "anchor.scope=device")
    moved, calm = ([line for line in records(tmp_path / name) if "loss" in line] for name in ("moved", "calm"))
    assert [line["step"] for line in moved] == list(range(1, 16))
    assert [line["fingerprint"] for line in moved] == [line["fingerprint"] for line in calm]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in calm], rel=1e-5)
    torch.manual_seed(0)
    start = parameters(build_model("lightweight", 10).state_dict())
    moved_to, expected, other = (parameters(weights(tmp_path / name)) for name in ("moved", "calm", "other"))
    assert float((moved_to - expected).norm() / (expected - start).norm()) <= 5e-5
    # the control: the same samples in the same order, but with an anchor for each rank
    assert float((other - expected).norm() / (expected - start).norm()) > 1e-3
