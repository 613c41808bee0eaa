"""Networks by name: their structure, their fp32 head, and the weights they start from."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oat_dist.errors import ConfigError, DataError
from oat_dist.models import Fp32Conv2d, Fp32Linear, Lightweight, build_model, norms_frozen


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_lightweight_network_is_the_papers() -> None:
    model = build_model("lightweight", 10)
    assert isinstance(model, Lightweight)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "weight" in name}
    assert list(shapes.values()) == [(6, 3, 5, 5), (16, 6, 5, 5), (128, 400), (64, 128), (10, 64)]
    assert parameters(model) == 6 * 76 + 16 * 151 + 401 * 128 + 129 * 64 + 65 * 10 == 63_106
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert parameters(build_model("lightweight", 101)) == 63_106 + 65 * 91
    assert build_model("lightweight", 1, image_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 1)


def test_initial_weights_follow_the_seed() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build_model("lightweight", 10).parameters())

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("lightweight", 64, "model.name=lightweight takes 32x32 images, not data.image_size=64"),
        ("alexnet", 32, "model.name=alexnet does not take data.image_size=32 (Given input size: (256x1x1)"),
        ("vit_b_32", 100, "model.name=vit_b_32 does not take data.image_size=100: Input shape indivisible"),
        ("resnet81", None, "model.name='resnet81' is unknown; did you mean resnet18"),
        ("lightwieght", None, "model.name='lightwieght' is unknown; did you mean lightweight?"),
        ("qqqq", None, "model.name='qqqq' is unknown; use lightweight or a name of torchvision.models"),
        ("fcn_resnet50", None, "model.name='fcn_resnet50' is unknown"),  # torchvision's, but no classifier
    ],
)
def test_networks_that_cannot_be(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(name, 10, image_size=size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("lightweight", 32, "classifier.5"),
        ("resnet18", 32, "fc"),
        ("mobilenet_v3_small", 32, "classifier.3"),
        ("squeezenet1_1", 64, "classifier.1"),
        ("shufflenet_v2_x0_5", 32, "fc"),
        ("mnasnet0_5", 32, "classifier.1"),
        ("vit_b_32", 64, "heads.head"),
    ],
)
def test_the_head_computes_in_fp32_inside_autocast(name: str, size: int, head: str) -> None:
    model = build_model(name, 7, image_size=size)
    assert model.training
    fp32 = [path for path, module in model.named_modules() if isinstance(module, (Fp32Linear, Fp32Conv2d))]
    assert fp32 == [head]
    seen: list[Tensor] = []
    model.get_submodule(head).register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits_BC = model.eval()(torch.zeros(2, 3, size, size))
    assert logits_BC.shape == (2, 7)
    assert logits_BC.dtype == seen[0].dtype == torch.float32


def test_a_bf16_head_would_not_do() -> None:
    """The negative control: targets near C - 1 fall between the steps of bf16."""
    head, plain = Fp32Linear(4, 2), nn.Linear(4, 2)
    for layer in (head, plain):
        nn.init.constant_(layer.weight, 0.25)
        nn.init.constant_(layer.bias, 99.7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert head(torch.zeros(1, 4, dtype=torch.bfloat16))[0, 0].item() == pytest.approx(99.7, abs=1e-5)
        assert abs(plain(torch.zeros(1, 4))[0, 0].item() - 99.7) > 0.04


def test_the_head_keeps_the_architectures_own_initialisation() -> None:
    for name, head in (("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")):
        import torchvision

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            ours = build_model(name, 7).get_submodule(head).state_dict()
            torch.manual_seed(5)
            theirs = torchvision.models.get_model(name, num_classes=7).get_submodule(head).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_trying_an_image_leaves_random_numbers_and_statistics_alone() -> None:
    states = []
    for size in (None, 32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = build_model("mobilenet_v3_small", 5, image_size=size)
            states.append((model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])


# Weights.


def save(folder: Path, model: nn.Module, drop: str = "", **extra: Tensor) -> str:
    path = folder / "weights.safetensors"
    tensors = {key: value for key, value in model.state_dict().items() if not (drop and key.startswith(drop))}
    save_file({**tensors, **extra}, path)
    return str(path)


@pytest.mark.parametrize("name", ["lightweight", "resnet18", "squeezenet1_1"])
def test_weights_of_the_same_network(tmp_path: Path, name: str) -> None:
    source = build_model(name, 10)
    path = save(tmp_path, source)
    same = build_model(name, 10, path)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items())
    head = {"lightweight": "classifier.5", "resnet18": "fc", "squeezenet1_1": "classifier.1"}[name]
    other = build_model(name, 3, path).state_dict()
    for key, value in source.state_dict().items():
        if key.startswith(head):
            assert other[key].shape == (3, *value.shape[1:])
        else:
            assert torch.equal(other[key], value)


def test_weights_without_a_head(tmp_path: Path) -> None:
    source = build_model("lightweight", 10)
    other = build_model("lightweight", 10, save(tmp_path, source, drop="classifier.5"))
    assert torch.equal(other.state_dict()["classifier.3.weight"], source.state_dict()["classifier.3.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    def refused(path: str, why: str) -> None:
        with pytest.raises(DataError) as caught:
            build_model("lightweight", 10, path)
        assert str(caught.value) == f"{path}: these weights are of another network: {why}; check model.name"

    source = build_model("lightweight", 10)
    refused(save(tmp_path, build_model("resnet18", 10)), "bn1.bias is not in the network")
    refused(
        save(tmp_path, source, **{"classifier.9.weight": torch.zeros(1)}), "classifier.9.weight is not in the network"
    )
    refused(save(tmp_path, source, drop="features.0"), "features.0.bias is missing")
    # A body layer with another number of outputs is no head, though only its first dimension differs.
    source.features[3] = nn.Conv2d(6, 20, 5)
    refused(save(tmp_path, source), "features.3.bias has another shape")
    source = build_model("lightweight", 10)
    source.classifier[5] = nn.Linear(32, 10)
    refused(save(tmp_path, source), "classifier.5.weight has another shape")


class Explosive:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    exploded, path = tmp_path / "exploded", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Explosive(exploded)))
    with pytest.raises(DataError, match=r"not a safetensors file .*; model.weights takes safetensors only"):
        build_model("lightweight", 10, str(path))
    assert not exploded.exists()
    pickle.loads(path.read_bytes())  # it does go off
    assert exploded.exists()
    torch.save(build_model("lightweight", 10).state_dict(), path)
    with pytest.raises(DataError, match="takes safetensors only"):
        build_model("lightweight", 10, str(path))


def test_weights_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"no such weights file \(model.weights\)"):
            build_model("lightweight", 10, str(place))
    whole = Path(save(tmp_path, build_model("lightweight", 10))).read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a safetensors file"):
            build_model("lightweight", 10, str(path))


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
