"""One training state for every engine: a run goes on under another one, on another number of ranks, and under its own
bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from portable_checks import BITWISE, OPTIMIZERS, STEPS, digests
from ranks import HERE, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from oat_dist.data.index import ShardSet
from oat_dist.models import build_model

# (engine, ranks, stop): the run is handed on at each stop. ZeRO-2 with the optimizer in host memory.
CHAIN = (("ddp", 2, 3), ("zero3", 3, 5), ("zero1", 1, 7), ("zero2", 2, STEPS))
BOUND = 5e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, ShardSet]) -> Path:
    root = tmp_path_factory.mktemp("portable")
    data = str(digits["train"].folder.parent)
    run_ranks(1, "portable_checks:part", str(root), data, "ddp", None, STEPS, True)
    # Small networks never take ZeRO-3's gathering path unless told so.
    settings = root / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    for engine, world, stop in CHAIN:
        offload = HERE.parent / "configs" / "deepspeed" / "zero2-offload.json"
        file = {"zero3": str(settings), "zero2": str(offload)}.get(engine)
        run_ranks(world, "portable_checks:part", str(root), data, engine, file, stop, False)
    return root


def tensors(run: Path, file: str, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / file)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    return float((difference / moved) ** 0.5)


def initial() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("lightweight", 10, image_size=32).state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_handed_from_engine_to_engine_is_the_undisturbed_one(runs: Path, optimizer: str) -> None:
    whole, chain = runs / f"whole-{optimizer}", runs / f"chain-{optimizer}"
    events = [json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines()]
    starts = [(e["engine"], e["world_size"], e["step"]) for e in events if e.get("event") in ("start", "resume")]
    assert starts == [(name, world, before) for (name, world, _), before in zip(CHAIN, (0, 3, 5, 7), strict=True)]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name in ("fingerprint", "step"):
        assert [e[name] for e in events if "loss" in e] == [e[name] for e in expected if "loss" in e]
    losses = [e["loss"] for e in expected if "loss" in e]
    assert [e["loss"] for e in events if "loss" in e] == pytest.approx(losses, rel=1e-4)
    start = initial()
    theta = tensors(whole, "model.safetensors")
    assert distance(tensors(chain, "model.safetensors"), theta, start) <= (BOUND if optimizer == "sgd" else 1e-3)
    zeros = {name: torch.zeros_like(value) for name, value in tensors(whole, "optimizer.safetensors").items()}
    state = tensors(whole, "optimizer.safetensors")
    assert distance(tensors(chain, "optimizer.safetensors"), state, zeros) <= 1e-4
    # the control: the state matters. A step earlier, or without the optimizer's state, is far off.
    assert distance(tensors(chain, "model.safetensors", 7), theta, start) > 1e-2


def test_every_checkpoint_loads_into_plain_torch(runs: Path) -> None:
    """Consolidated, fp32, strict: from DDP, ZeRO-3, ZeRO-1 and ZeRO-2."""
    for optimizer in OPTIMIZERS:
        for _, _, step in CHAIN[-2:]:  # the newest two are kept
            model = build_model("lightweight", 10, image_size=32)
            weights = tensors(runs / f"chain-{optimizer}", "model.safetensors", step)
            assert {value.dtype for value in weights.values()} == {torch.float32}
            model.load_state_dict(weights, strict=True)
            assert bool(torch.isfinite(model(torch.zeros(2, 3, 32, 32))).all())
    names = {path.suffix for path in runs.rglob("*") if path.is_file()}
    assert names & {".pt", ".pth", ".pkl", ".bin"} == set()  # no pickle was written


@pytest.mark.parametrize(("engine", "optimizer"), BITWISE)
def test_resume_under_the_same_engine_is_bitwise(runs: Path, engine: str, optimizer: str) -> None:
    """With BatchNorm, dropout, flips and clipping."""
    whole = digests(runs / f"{engine}-whole-{optimizer}" / "checkpoints" / "step-3")
    resumed = digests(runs / f"{engine}-resumed-{optimizer}" / "checkpoints" / "step-3")
    assert {"model.safetensors", "optimizer.safetensors"} <= whole.keys()
    if engine != "zero3":
        assert whole["model.safetensors"] != whole["raw.safetensors"]  # the average, and the weights
    assert {name for name in whole if whole[name] != resumed[name]} == set()
    assert whole.keys() == resumed.keys()
