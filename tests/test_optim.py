"""Optimizers and learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from oat_dist.config import Config
from oat_dist.engine.replica import set_learning_rate
from oat_dist.errors import ConfigError
from oat_dist.optim import Schedule, build_optimizer
from oat_dist.parts import learning_rate


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def two_losses(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64)).square().sum()


def test_constant_and_warm_up() -> None:
    schedule = Schedule("constant", 1.0, total=100, warmup=4)
    assert [schedule(step) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert Schedule("constant", 0.3, total=1)(10**9) == 0.3


def test_cosine_runs_from_lr_to_final_lr_after_the_warm_up() -> None:
    schedule = Schedule("cosine", 0.5, total=110, warmup=10, final_lr=0.1)
    assert schedule(9) == pytest.approx(0.5 * 10 / 11)
    assert schedule(10) == 0.5
    assert schedule(60) == pytest.approx(0.3)
    assert schedule(35) == pytest.approx(0.1 + 0.4 * (1 + math.sqrt(0.5)) / 2)
    assert schedule(110) == pytest.approx(0.1)
    assert schedule(500) == pytest.approx(0.1)
    falling = [schedule(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_that_is_all_warm_up() -> None:
    schedule = Schedule("cosine", 1.0, total=3, warmup=3)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_step() -> None:
    schedule = Schedule("step", 1.0, total=9, step_length=3, gamma=0.1)
    assert [schedule(step) for step in (0, 2, 3, 5, 6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_schedule_is_a_pure_function() -> None:
    for kind in ("constant", "cosine", "step"):
        schedule = Schedule(kind, 0.7, total=50, warmup=5, step_length=7, gamma=0.3, final_lr=0.01)
        forwards = [schedule(step) for step in range(60)]
        assert [schedule(step) for step in reversed(range(60))] == forwards[::-1]
        assert Schedule(kind, 0.7, total=50, warmup=5, step_length=7, gamma=0.3, final_lr=0.01)(31) == forwards[31]
        assert all(0 < rate <= 0.7 for rate in forwards)


def test_epochs_become_steps() -> None:
    schedule = learning_rate(Config(), steps_per_epoch=40)
    assert (schedule.total, schedule.warmup, schedule.step_length) == (4000, 0, 1200)


def test_another_learning_rate_after_the_switch() -> None:
    usual, other = Schedule("cosine", 0.1, 100), Schedule("cosine", 0.1, 100, switch=40, later_scale=10.0)
    assert [other(step) for step in range(40)] == [usual(step) for step in range(40)]
    assert [other(step) for step in range(40, 100)] == [10 * usual(step) for step in range(40, 100)]


def test_stopping_early_does_not_bend_the_schedule() -> None:
    """A run that `max_steps` stops goes on later as if it had not stopped."""
    assert learning_rate(Config(max_steps=7), 40) == learning_rate(Config(), 40)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.schedule must be one of constant, cosine, step, not 'linear'"):
        Schedule("linear", 1.0, total=10)
    with pytest.raises(ConfigError, match=r"optim.name must be one of sgd, adamw, not 'adam'"):
        build_optimizer(net(), "adam", 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    model = net()
    optimizer = build_optimizer(model, name, 0.1, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {key: decay[id(parameter)] for key, parameter in model.named_parameters()}
    assert by_name == {"0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0.5, "3.bias": 0}
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {key: not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters()}
    assert moved == {key: value > 0 for key, value in by_name.items()}


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    head = [name for name in names if name.startswith("3.")]
    optimizer = build_optimizer(model, "sgd", 0.1, head=head, head_lr_scale=10.0)
    by_id = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: by_id[id(p)] for name, p in model.named_parameters()} == {
        name: 10.0 if name in head else 1.0 for name in names
    }
    plain = build_optimizer(model, "sgd", 0.1, head=head)
    assert len(plain.param_groups) < len(optimizer.param_groups)
    assert {group["lr_scale"] for group in plain.param_groups} == {1.0}
    set_learning_rate(optimizer.param_groups, 0.5)
    assert {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups} == {(1.0, 0.5), (10.0, 5.0)}


def test_frozen_parameters_are_left_out() -> None:
    model = net()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(model, "sgd", 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_are_those_of_plain_torch(name: str) -> None:
    ours, theirs = net(), net()
    optimizer = build_optimizer(ours, name, 0.01, momentum=0.8, weight_decay=0.0, betas=(0.7, 0.9))
    if name == "sgd":
        plain: torch.optim.Optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.8)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.7, 0.9), weight_decay=0.0)
    for step in range(5):
        for model, chosen in ((ours, optimizer), (theirs, plain)):
            chosen.zero_grad()
            two_losses(model, step).backward()
            chosen.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sgd_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    model = nn.Module()
    model.register_parameter("weight", parameter)
    optimizer = build_optimizer(model, "sgd", 0.1, momentum=0.5, weight_decay=0.2)
    expected, velocity = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([3.0, 4.0], [-1.0, 0.5]):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        velocity = [0.5 * v + g + 0.2 * x for v, g, x in zip(velocity, gradient, expected, strict=True)]
        expected = [x - 0.1 * v for x, v in zip(expected, velocity, strict=True)]
    assert parameter.tolist()[0] == pytest.approx(expected, abs=1e-15)
