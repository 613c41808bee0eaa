"""Every engine gives the training of one process: DDP and ZeRO-1, 2, 3 on two real gloo ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

ENGINES = ("ddp", "zero1", "zero2", "zero3")
BOUND, CONTROL = 5e-5, 1e-3


@functools.cache
def _matrix(folder: Path, engine: str, precision: str) -> list[Any]:
    file = None
    if engine == "zero3":
        # Below the default threshold small parameters stay whole on every rank: nothing would be gathered here.
        path = folder / "zero3.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
        file = str(path)
    return run_ranks(2, "engine_checks:matrix", engine, file, precision, timeout=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("engine", ENGINES)
def test_ten_steps_are_those_of_one_process(folder: Path, engine: str) -> None:
    distances = _matrix(folder, engine, "no")[0]["distances"]
    assert len(distances) == 3 * 3 * 2  # spans and micro-batches x scopes x attached, detached
    assert {key: value for key, value in distances.items() if not value <= BOUND} == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_ways_are_far_off(folder: Path, engine: str) -> None:
    """Else the bound would show nothing."""
    controls = dict(_matrix(folder, engine, "no")[0]["controls"])
    assert controls.pop("right") <= BOUND
    assert set(controls) == {"bare all-reduce", "per-rank anchor", "anchor of a micro-batch", "swapped sample"}
    assert {key: value for key, value in controls.items() if not value > CONTROL} == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_one_collective_for_each_global_anchor_and_none_else(folder: Path, engine: str) -> None:
    """Ours, in a step of two micro-batches; the engine's own exchange of gradients is not among them."""
    expected = {f"{scope}/{span}": 0 for scope in ("device", "global", "group") for span in ("micro", "step")}
    expected |= {"global/micro": 2, "global/step": 1}
    for found in _matrix(folder, engine, "no"):
        assert found["collectives"] == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_finite_do_not_pass_in_silence(folder: Path, engine: str) -> None:
    for found in _matrix(folder, engine, "no"):
        if engine == "ddp":
            assert found["refused"] == "weights are not finite (None)"  # found at the next log line, before any save
        else:
            assert found["refused"].startswith("gradients are not finite")


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_zero_holds_its_share(folder: Path, engine: str) -> None:
    """Masters are the fp32 weights, not copies; they and the momentum are halves (and the weights, under ZeRO-3)."""
    for found in _matrix(folder, engine, "no"):
        held = found["partitions"]
        half, slack = held["whole"] / 2, 100  # every parameter or group is padded to equal parts
        assert held["optimizer"] == "SGD" and held["shared"]
        assert half <= held["masters"] <= half + slack
        assert half <= held["momentum"] <= half + slack
        assert held["weights"] == held["whole"] if engine != "zero3" else half <= held["weights"] <= half + slack


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_is_as_close_as_with_cross_entropy(folder: Path, engine: str) -> None:
    """METHOD's measure for bf16: at most twice the difference that cross-entropy shows under the same split."""
    found = _matrix(folder, engine, "bf16")[0]
    for span in ("micro", "step"):
        allowed = 2 * found[f"{span}/cross-entropy"]
        assert 0 < found[f"{span}/attached"] <= allowed
        assert 0 < found[f"{span}/detached"] <= allowed
