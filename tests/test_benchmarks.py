"""The benchmarks measure what they say, and the ViT-L-16 config trains, on real processes with a small ViT.

Class anchors, which are a benchmark's alone, are those of the formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from benchmarks.class_anchors import ClassAnchors, class_anchors, nearest_anchor_scores
from oat_dist.data.index import ShardSet
from oat_dist.errors import DataError

CONFIG = Path(__file__).parents[1] / "configs" / "vit" / "vit_l_16.yaml"
SMALL = "test_vit"  # timm's, 0.4 M parameters, for images of 160x160
BUCKET = 5_000  # elements: small beside the network, as the benchmark's is beside ViT-L-16


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return {
        engine: run_ranks(2, "benchmarks.memory:rank", engine, f"timm/{SMALL}", 160, "sgd", "no", BUCKET)[0]
        for engine in ("ddp", "zero3")
    }


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_rank_holds_what_theory_says(measured: dict[str, Any], engine: str) -> None:
    found = measured[engine]
    slack = 0.02 * 4 * found["elements"]  # padding to equal parts; a gradient that is a view of a larger tensor
    for moment, expected in found["theory"].items():
        for kind, size in expected.items():
            assert size <= found["moments"][moment][kind] <= size + slack, (moment, kind)


def test_nothing_held_is_forgotten(measured: dict[str, Any]) -> None:
    """Besides, Python knows of the images and the anchors, and of no second set of weights."""
    images = 4 * 3 * 160 * 160
    for found in measured.values():
        for held in found["moments"].values():
            assert images <= held["every live tensor"] - held["held"] < images + 0.05 * 4 * found["elements"]


def test_zero3_at_rest_holds_half_of_ddp(measured: dict[str, Any]) -> None:
    """All it holds, against DDP's parameters and optimizer state alone, without the gradients in DDP's buckets."""
    zero3, ddp = (measured[engine]["moments"]["at rest"] for engine in ("zero3", "ddp"))
    assert 0.5 <= zero3["held"] / (ddp["parameters"] + ddp["optimizer state"]) <= 0.52


def test_a_small_vit_trains_with_the_config_of_vit_l_16(digits: dict[str, ShardSet], tmp_path: Path) -> None:
    """ZeRO-3, bf16, accumulation, recomputed activations, one anchor a step; plain timm takes the weights."""
    arguments = {
        "model.name": f"timm/{SMALL}",
        "data.path": str(digits["train"].folder.parent),
        "data.eval_split": "null",
        "data.image_size": "160",
        "engine.name": "zero3",
        "batch_size": "8",
        "micro_batch_size": "2",
        "pretrain_epochs": "0",
        "max_steps": "2",
        "log.every_steps": "1",
        "output_dir": str(tmp_path / "run"),
    }
    overrides = [f"{key}={value}" for key, value in arguments.items()]
    assert run_ranks(2, "oat_dist.train:main", [str(CONFIG), *overrides]) == [0, 0]

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    start = next(line for line in lines if line.get("event") == "start")
    assert (start["engine"], start["precision"], start["world_size"]) == ("zero3", "bf16", 2)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)

    weights = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    plain = timm.create_model(SMALL, num_classes=10)
    plain.load_state_dict(weights)
    outputs = plain.eval()(torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
    assert outputs.shape == (2, 10) and bool(outputs.isfinite().all())


def test_class_anchors_are_those_of_the_formula() -> None:
    """Against sample by sample in plain Python; no gradient goes through the anchors."""
    random = torch.Generator().manual_seed(0)
    labels_N = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    logits_NC = torch.randn(7, 3, generator=random, dtype=torch.float64)
    anchors_KC = class_anchors(logits_NC, labels_N)
    for k in range(3):
        mean_C = sum(logits_NC[i] for i in range(7) if labels_N[i] == k) / int((labels_N == k).sum())
        assert torch.allclose(anchors_KC[k], torch.softmax(mean_C, 0), rtol=1e-12)
    with pytest.raises(DataError, match="class 1 has no sample among 2; take more --images"):
        class_anchors(logits_NC[:2], labels_N[:2])

    outputs_NC = torch.randn(7, 3, generator=random, dtype=torch.float64).requires_grad_()
    loss = ClassAnchors(anchors_KC).loss(outputs_NC, labels_N, 7, None)
    (gradient_NC,) = torch.autograd.grad(loss, outputs_NC)
    total = 0.0
    for i, label in enumerate(labels_N.tolist()):
        for k in range(3):
            error = float(outputs_NC[i, k].detach()) - ((1 / float(anchors_KC[label, k]) if k == label else 0) - 1)
            total += error**2 / 21
            assert float(gradient_NC[i, k]) == pytest.approx(2 * error / 21)
    assert float(loss.detach()) == pytest.approx(total)

    scores_NC = nearest_anchor_scores(logits_NC, anchors_KC)
    found = set()
    for i in range(7):
        shares_C = torch.softmax(logits_NC[i], 0)
        nearest = min(range(3), key=lambda k: float((shares_C - anchors_KC[k]).square().sum()))
        assert torch.allclose(scores_NC[i], anchors_KC[nearest] * (logits_NC[i] + 1))
        found.add(nearest)
    assert len(found) > 1  # or any anchor would do


def test_times_with_anchors(digits: dict[str, ShardSet]) -> None:
    """Every side runs, is timed in every repeat, and tests the same images."""
    asked = ["--images", "100", "--test-images", "70", "--repeats", "2", "--batch-size", "16"]
    (found,) = run_ranks(1, "benchmarks.anchors:rank", str(digits["train"].folder.parent), *asked)
    assert list(found["train"]) == ["cross-entropy", "OAT", "class anchors"]
    assert next(iter(found["test"])) == "cross-entropy" and len(found["test"]) == 5
    for seconds in (*found["train"].values(), *found["test"].values()):
        assert len(seconds) == 2 and min(seconds) > 0
    assert found["beforehand"] > 0
    correct = found["correct"]
    assert correct.keys() == found["test"].keys() and max(correct.values()) <= 70
    assert correct["class anchors, nearest"] == correct["the same, one image at a time"]
