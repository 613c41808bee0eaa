"""`model.freeze`, and BatchNorm layers whose statistics are to stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oat_dist.errors import ConfigError
from oat_dist.models import build_model, freeze, norms_frozen, statistics_untouched, takes_single_samples
from oat_dist.models.norms import training_norms


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def step(model: nn.Module, size: int = 32) -> None:
    """One step of SGD on random images."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    optimizer.step()


# Freezing.


def test_freezing_a_part() -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", 3)
    keys = list(model.state_dict())
    frozen = freeze(model, "conv1.* bn1.* layer[12].*")
    parts = ("conv1.", "bn1.", "layer1.", "layer2.")
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith(parts)]
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = state(model)
    step(model)
    after = model.state_dict()
    assert list(after) == keys
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.startswith(parts), key  # parameters, statistics and counts
    held = [
        path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and not module.training
    ]
    assert held == [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)][: len(held)]
    assert len(held) == 1 + 4 + 5


def test_without_freezing_the_statistics_move() -> None:
    """The negative control: the same step on the network as it is."""
    torch.manual_seed(0)
    model = build_model("resnet18", 3)
    before = state(model)
    step(model)
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "timm/test_vit", "timm/test_efficientnet", "lightweight"]
)
def test_freezing_the_body(name: str) -> None:
    model = build_model(name, 3)
    frozen = freeze(model, "body")
    left = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert [key.rpartition(".")[2] for key in left] == ["weight", "bias"]
    assert len({key.rpartition(".")[0] for key in left}) == 1
    assert sorted(frozen + left) == sorted(key for key, _ in model.named_parameters())
    before = state(model)
    step(model, 64 if name != "lightweight" else 32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in left)
    assert training_norms(model) == []


def test_half_a_norm_keeps_learning() -> None:
    model = build_model("resnet18", 3)
    freeze(model, "*.weight")
    assert len(training_norms(model)) == 20
    before = state(model)
    step(model)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
    assert torch.equal(model.bn1.weight, before["bn1.weight"])


def test_norms_without_parameters_go_with_what_stands_around_them() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
    )
    freeze(model, "0.*")
    model.train()
    assert (model[0][1].training, model[1][1].training) == (False, True)


def test_patterns_add_up_and_a_second_call_does_too() -> None:
    model = build_model("lightweight", 3)
    assert freeze(model, "features.0.*  features.3.bias") == ["features.0.weight", "features.0.bias", "features.3.bias"]
    assert freeze(model, "classifier.1.weight") == ["classifier.1.weight"]
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 4


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            "layer9.*",
            r"model.freeze: 'layer9.\*' matches no parameter; did you mean layer4.\* or layer3.\* or layer2.\*",
        ),
        ("layer1", r"model.freeze: 'layer1' matches no parameter; did you mean layer1.\*"),
        ("conv1.* bnn1.*", r"model.freeze: 'bnn1.\*' matches no parameter; did you mean bn1.\*"),
        ("*", "leaves no parameter to learn; freeze less, or 'body'"),
        ("f*.* [!f]*", "leaves no parameter to learn"),
        ("body fc.*", "'body' matches no parameter"),
        (" ", "model.freeze is empty"),
    ],
)
def test_patterns_that_make_no_sense(patterns: str, message: str) -> None:
    model = build_model("resnet18", 3)
    with pytest.raises(ConfigError, match=message):
        freeze(model, patterns)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(training_norms(model)) == 20


def test_a_frozen_norm_stays_so_whatever_is_called() -> None:
    model = build_model("resnet18", 3)
    freeze(model, "bn1.*")
    for wake in (model.train, model.bn1.train, lambda: model.eval().train()):
        wake()
        assert not model.bn1.training
        assert model.layer1[0].bn1.training
    with norms_frozen(model, True):
        assert training_norms(model) == []
    assert not model.bn1.training
    assert len(training_norms(model)) == 19
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert takes_single_samples(model, 32) is False  # of the others
    freeze(model, "bn1.*")  # once more does nothing
    assert type(model.bn1).__mro__.count(nn.BatchNorm2d) == 1
    freeze(model, "body")
    assert takes_single_samples(model, 32)


# Statistics.


def test_norms_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.GroupNorm(2, 4))
    images = torch.randn(3, 3, 2, 2)
    with norms_frozen(model, True):
        assert [module.training for module in model] == [True, False, True, True]
        model(images)
    assert all(module.training for module in model)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].num_batches_tracked == 0
    with pytest.raises(ZeroDivisionError), norms_frozen(model, True):
        raise ZeroDivisionError
    assert model[1].training
    with norms_frozen(model, False):
        model(images)
    assert model[1].num_batches_tracked == 1
    model[1].eval()
    with norms_frozen(model, True):
        model(images)
    assert not model[1].training  # as it was
    model.eval()
    with norms_frozen(model, True):
        pass
    assert not model[1].training


@pytest.mark.parametrize("name", ["resnet18", "timm/test_efficientnet"])
def test_statistics_untouched(name: str) -> None:
    torch.manual_seed(0)
    model, images = build_model(name, 3), torch.randn(4, 3, 32, 32)
    freeze(model, "bn1.*")
    before = state(model)
    with statistics_untouched(model), torch.no_grad():
        quiet_BC = model(images)
        again_BC = model(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        trained_BC = model(images)
    assert torch.equal(quiet_BC, trained_BC)
    assert torch.equal(again_BC, trained_BC)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and path != "bn1"}
    assert moved == {f"{p}.{b}" for p in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    with torch.no_grad():
        assert not torch.equal(model.eval()(images), trained_BC)  # the negative control: eval is another function


def test_statistics_untouched_lets_go_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3).eval())
    with pytest.raises(ZeroDivisionError), statistics_untouched(model):
        assert [norm.track_running_stats for norm in model] == [False, False, True]
        raise ZeroDivisionError
    assert [norm.track_running_stats for norm in model] == [True, False, True]
