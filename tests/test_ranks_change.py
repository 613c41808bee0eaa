"""A run that goes on with another number of ranks: 4, then 2, then 3, at a global batch none of them divides."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from test_training import flat, initial_weights, packed, records

from oat_dist.data.index import ShardSet


def test_four_then_two_then_three_ranks_are_one_run(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """DDP, global anchors, neither BatchNorm nor dropout: the same samples in the same order, the same losses and
    weights to rounding, as on one process that nobody disturbed."""
    for world, stop in ((4, 5), (2, 9), (3, 15)):
        run_ranks(world, "stopping_checks:until", str(tmp_path), packed(digits), "moved", stop)
    run_ranks(1, "stopping_checks:until", str(tmp_path), packed(digits), "calm", 15)
    moved, calm = ([line for line in records(tmp_path / name) if "loss" in line] for name in ("moved", "calm"))
    assert [line["step"] for line in moved] == list(range(1, 16))
    assert [line["fingerprint"] for line in moved] == [line["fingerprint"] for line in calm]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in calm], rel=1e-5)
    start, expected = initial_weights(), flat(tmp_path / "calm")
    assert float((flat(tmp_path / "moved") - expected).norm() / (expected - start).norm()) <= 5e-5
    # the control: the same samples in the same order, but with an anchor for each rank
    run_ranks(3, "stopping_checks:until", str(tmp_path), packed(digits), "other", 15, "anchor.scope=device")
    assert float((flat(tmp_path / "other") - expected).norm() / (expected - start).norm()) > 1e-3
