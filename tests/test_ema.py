"""The average of the weights: what it is, that training does not notice it, and that it is what answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_checks import DECAY, STEPS
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from oat_dist.data.index import ShardSet
from oat_dist.ema import WeightAverage
from oat_dist.models import build_model
from oat_dist.predict import OATClassifier


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def averaged(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The definition, in float64, over the weights from the start on; whole numbers are the last ones."""
    average = {name: value.double() if value.is_floating_point() else value for name, value in history[0].items()}
    for update, weights in enumerate(history[1:]):
        d = min(decay, (1 + update) / (10 + update))
        for name, value in weights.items():
            average[name] = d * average[name] + (1 - d) * value.double() if value.is_floating_point() else value
    return {name: value.to(history[0][name].dtype) for name, value in average.items()}


def test_it_is_the_average_of_its_definition() -> None:
    network = small()
    average, history = WeightAverage(network, 0.9), [state(network)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(100):  # the warm-up of 0.9 takes 81
        network(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        history.append(state(network))
    found = average.of(network.state_dict())
    assert_close(found, averaged(history, 0.9), rtol=1e-5, atol=1e-6)
    assert found["1.num_batches_tracked"] == 100
    assert not torch.allclose(found["0.weight"], averaged(history, 0.8)["0.weight"], rtol=1e-5, atol=1e-6)  # control


def test_in_place_and_back() -> None:
    network = small()
    average = WeightAverage(network, 0.9)
    before = state(network)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(1)
    after, pointers = state(network), [value.data_ptr() for value in network.state_dict().values()]
    with pytest.raises(KeyError), average.in_place():
        assert_close(state(network), before, rtol=0, atol=0)
        raise KeyError  # an evaluation that is cut short
    assert_close(state(network), after, rtol=0, atol=0)
    assert [value.data_ptr() for value in network.state_dict().values()] == pointers
    assert_close(average.of(after), before, rtol=0, atol=0)


def test_without_a_decay_nothing_is_kept() -> None:
    network = small()
    off = WeightAverage(network, None)
    off.update()
    weights = network.state_dict()
    with off.in_place():
        assert off.of(weights) == weights and off.updates == 0 and not off._averages


# Whole runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, ShardSet]) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("ema")
    return root, run_ranks(1, "ema_checks:runs", str(root), str(digits["train"].folder.parent))[0]


def tensors(run: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


def test_training_does_not_notice(runs: tuple[Path, dict[str, Any]]) -> None:
    """The weights to go on with, and all else that it needs, are those of a run without an average."""
    plain, with_average = runs[0] / "plain", runs[0] / "averaged"
    for step in range(1, STEPS + 1):
        assert_close(tensors(with_average, step, "raw"), tensors(plain, step), rtol=0, atol=0)
        for name in ("optimizer", "rank-00000"):
            assert_close(tensors(with_average, step, name), tensors(plain, step, name), rtol=0, atol=0)
    assert not (plain / "checkpoints" / "step-1" / "raw.safetensors").exists()


def test_the_model_of_a_checkpoint_is_the_average(runs: tuple[Path, dict[str, Any]]) -> None:
    """From the weights of every step, also over the switch to OAT; and nothing else of the run shows it."""
    torch.manual_seed(0)
    history = [build_model("lightweight", 10, image_size=32).state_dict()]
    for step in range(1, STEPS + 1):
        history.append(tensors(runs[0] / "plain", step))
        found = tensors(runs[0] / "averaged", step)
        assert_close(found, averaged(history, DECAY), rtol=1e-4, atol=1e-6)
    assert all(not torch.allclose(found[name], value, rtol=1e-3, atol=1e-5) for name, value in history[-1].items())
    classifier = OATClassifier.from_checkpoint(runs[0] / "averaged")
    assert classifier.card["ema"] == classifier.source["ema"] == DECAY
    assert "ema" not in OATClassifier.from_checkpoint(runs[0] / "plain").card


def test_the_average_is_what_is_evaluated(runs: tuple[Path, dict[str, Any]]) -> None:
    """While training, as from its checkpoint; the weights themselves would have answered otherwise."""
    found = runs[1]
    assert found["evaluated"] == found["evaluated again"] and set(found["evaluated"]) >= {"batch", "stored"}
    assert found["evaluated"] != found["evaluated raw"]


def test_a_run_keeps_its_average_or_none(runs: tuple[Path, dict[str, Any]]) -> None:
    assert f"belongs to another configuration: optim.ema={DECAY} became None" in runs[1]["dropped"]
    assert f"belongs to another configuration: optim.ema=None became {DECAY}" in runs[1]["added"]


def test_copies_with_and_without(runs: tuple[Path, dict[str, Any]]) -> None:
    """With an average it begins from the weights of one that has none; without, from the raw weights."""
    root = runs[0]
    start = tensors(root / "plain", 7)
    assert_close(tensors(root / "begun-averaged", 7), start, rtol=0, atol=0)
    assert_close(tensors(root / "begun-averaged", 7, "raw"), start, rtol=0, atol=0)
    assert_close(tensors(root / "begun-plain", 7), start, rtol=0, atol=0)
    for name, file in (("begun-averaged", "raw"), ("begun-plain", "model")):
        assert_close(tensors(root / name, 8, file), tensors(root / "plain", 8), rtol=0, atol=0)
    first = averaged([start, tensors(root / "plain", 8)], DECAY)
    assert_close(tensors(root / "begun-averaged", 8), first, rtol=1e-4, atol=1e-6)
    facts = json.loads((root / "begun-averaged" / "checkpoints" / "step-8" / "state.json").read_text())
    assert facts["ema_updates"] == 1


def test_zero3_is_refused_by_name(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    said = run_ranks(1, "ema_checks:zero3", str(tmp_path), str(digits["train"].folder.parent))[0]
    assert said == "optim.ema works with ddp, zero1 and zero2; under zero3 no rank has whole weights to average"
