"""`model.weights`: files of tensors, where they fit, and what is said where they do not."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oat_dist.errors import DataError
from oat_dist.models import LoadedWeights, build_model, head_paths, load_weights
from oat_dist.models.state_dicts import read_state_dict


def save(folder: Path, model: nn.Module, drop: str = "", **extra: Tensor) -> str:
    path = folder / "weights.safetensors"
    tensors = {key: value for key, value in model.state_dict().items() if not (drop and key.startswith(drop))}
    save_file({**tensors, **extra}, path)
    return str(path)


def equal(one: nn.Module, other: nn.Module, but: tuple[str, ...] = ("-",)) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items() if not key.startswith(but))


# The head, and the rest.


@pytest.mark.parametrize("name", ["lightweight", "resnet18", "squeezenet1_1", "timm/test_vit"])
def test_weights_of_the_same_network(tmp_path: Path, name: str) -> None:
    source = build_model(name, 10)
    path = save(tmp_path, source)
    same = build_model(name, 10)
    assert not equal(same, source)
    assert load_weights(same, name, path) == LoadedWeights(path, head_loaded=True, tensors=len(source.state_dict()))
    assert equal(same, source)
    assert equal(build_model(name, 10, path), source)
    (head,) = head_paths(source)
    other = build_model(name, 3)
    before = {key: value.clone() for key, value in other.state_dict().items() if key.startswith(head)}
    assert load_weights(other, name, path) == LoadedWeights(path, False, len(source.state_dict()) - len(before))
    for key, value in source.state_dict().items():
        assert torch.equal(other.state_dict()[key], before.get(key, value)), key
    assert len(before) == 2


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_lite0"])
def test_a_new_head_on_trained_features_starts_small(tmp_path: Path, name: str) -> None:
    """EfficientNets' own start is +-1/sqrt(C), made for a thousand classes."""
    path = save(tmp_path, build_model(name, 1000))
    fresh, model = build_model(name, 2), build_model(name, 2)
    (head,) = head_paths(model)
    limit = fresh.get_submodule(head).weight.shape[1] ** -0.5
    assert fresh.get_submodule(head).weight.abs().max() > 10 * limit  # the control, and from scratch it stays so
    load_weights(model, name, path)
    assert 0 < model.get_submodule(head).weight.abs().max() <= limit


def test_weights_without_a_head(tmp_path: Path) -> None:
    source = build_model("lightweight", 10)
    model = build_model("lightweight", 10)
    loaded = load_weights(model, "lightweight", save(tmp_path, source, drop="classifier.5"))
    assert (loaded.head_loaded, loaded.tensors) == (False, 8)
    assert equal(model, source, but=("classifier.5",))
    assert not torch.equal(model.classifier[5].weight, source.classifier[5].weight)


def test_half_a_head_is_none(tmp_path: Path) -> None:
    source, model = build_model("lightweight", 10), build_model("lightweight", 10)
    loaded = load_weights(model, "lightweight", save(tmp_path, source, drop="classifier.5.bias"))
    assert (loaded.head_loaded, loaded.tensors) == (False, 8)
    assert not torch.equal(model.classifier[5].weight, source.classifier[5].weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    def refused(path: str, why: str, name: str = "lightweight") -> None:
        model = build_model(name, 10)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(DataError) as caught:
            load_weights(model, name, path)
        assert str(caught.value) == f"{path}: these weights are of another network: {why}; check model.name"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    source = build_model("lightweight", 10)
    refused(save(tmp_path, build_model("resnet18", 10)), "bn1.bias is not in the network")
    refused(save(tmp_path, build_model("resnet34", 10)), "layer1.2.bn1.bias is not in the network", "resnet18")
    refused(
        save(tmp_path, build_model("timm/test_vit2", 10)),
        "blocks.0.ls1.gamma is not in the network",
        "timm/test_vit",
    )
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


# What torchvision and timm do to their own files.


def test_densenets_old_names(tmp_path: Path) -> None:
    """torchvision publishes its DenseNets with names that its loader mends."""
    source = build_model("densenet121", 4)
    old = {
        key.replace(".norm1.", ".norm.1.")
        .replace(".conv1.", ".conv.1.")
        .replace(".norm2.", ".norm.2.")
        .replace(".conv2.", ".conv.2."): value
        for key, value in source.state_dict().items()
        if not key.endswith("num_batches_tracked")  # which files of that age lack
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    path = tmp_path / "densenet121.pth"
    torch.save(old, path)
    model = build_model("densenet121", 4)
    assert load_weights(model, "densenet121", path).head_loaded
    assert equal(model, source)


def test_googlenets_auxiliary_heads_are_left_out(tmp_path: Path) -> None:
    import torchvision

    published = torchvision.models.googlenet(num_classes=6, init_weights=False)
    path = tmp_path / "googlenet.pth"
    torch.save(published.state_dict(), path)
    model = build_model("googlenet", 6)
    assert load_weights(model, "googlenet", path).head_loaded
    assert equal(model, published)
    assert model.transform_input  # as torchvision builds it with published weights


def test_torchvisions_position_embeddings_follow_the_image_size(tmp_path: Path) -> None:
    source = build_model("vit_b_32", 4, image_size=64)  # 2 x 2 patches and the class token
    nn.init.normal_(source.heads.head.weight)
    path = save(tmp_path, source)
    model = build_model("vit_b_32", 4, image_size=96)
    loaded = load_weights(model, "vit_b_32", path, image_size=96)
    assert (loaded.head_loaded, loaded.tensors) == (True, len(source.state_dict()))
    assert equal(model, source, but=("encoder.pos_embedding",))
    given, own = source.encoder.pos_embedding, model.encoder.pos_embedding
    assert (given.shape, own.shape) == ((1, 5, 768), (1, 10, 768))
    assert torch.equal(own[:, 0], given[:, 0])
    assert torch.equal(own[0, [1, 3, 7, 9]], given[0, 1:])  # the corners keep their place
    path = save(tmp_path, source, **{"encoder.pos_embedding": torch.zeros(1, 4, 768)})  # three patches are no square
    with pytest.raises(DataError, match=r"encoder.pos_embedding has another shape; check model.name"):
        load_weights(model, "vit_b_32", path, 96)


def test_timms_filter_changes_layout_and_image_size(tmp_path: Path) -> None:
    """DeiT's published files have distillation names and 224 pixels; Swin's windows depend on the image."""
    name = "timm/vit_tiny_patch16_224"
    source = build_model(name, 4, image_size=32)
    path = save(tmp_path, source)
    for classes in (4, 3):
        model = build_model(name, classes, image_size=64)
        state = torch.get_rng_state()
        loaded = load_weights(model, name, path, image_size=64)
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.head_loaded == (classes == 4)
        assert equal(model, source, but=("pos_embed",) if classes == 4 else ("pos_embed", "head."))
        given, own = source.pos_embed, model.pos_embed
        assert (given.shape, own.shape) == ((1, 5, 192), (1, 17, 192))
        assert torch.equal(own[:, 0], given[:, 0])
    with pytest.raises(DataError, match="pos_embed has another shape"):
        load_weights(build_model("timm/vit_tiny_patch16_224", 4, image_size=64), "timm/vit_tiny_patch16_224",
                     save(tmp_path, source, pos_embed=torch.zeros(1, 5, 64)), 64)  # fmt: skip


# Wrappings.


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "arch": "resnet18"},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_state_dicts_of_pytorch(tmp_path: Path, suffix: str, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    source, path = build_model("lightweight", 10), tmp_path / f"model{suffix}"
    torch.save(wrap(dict(source.state_dict())), path)
    assert equal(build_model("lightweight", 10, str(path)), source)


def test_the_old_format_of_pytorch(tmp_path: Path) -> None:
    source, path = build_model("lightweight", 10), tmp_path / "model.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    assert equal(build_model("lightweight", 10, str(path)), source)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    source, path = build_model("lightweight", 10), tmp_path / "model.pth"
    torch.save({key: value.bfloat16() for key, value in source.state_dict().items()}, path)
    model = build_model("lightweight", 10, str(path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.features[0].weight, source.features[0].weight.bfloat16().float())


# Files that are none.


class Explosive:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    exploded, path = tmp_path / "exploded", tmp_path / "model.pt"
    state = build_model("lightweight", 10).state_dict()
    for write in (
        lambda: path.write_bytes(pickle.dumps(Explosive(exploded))),
        lambda: torch.save({**state, "extra": Explosive(exploded)}, path),
        lambda: torch.save({**state, "extra": Explosive(exploded)}, path, _use_new_zipfile_serialization=False),
        lambda: torch.save(build_model("lightweight", 10), path),  # a whole module
    ):
        write()
        with pytest.raises(DataError) as caught:
            build_model("lightweight", 10, str(path))
        assert str(caught.value).startswith(f"{path}: not a plain state dict (")
        assert str(caught.value).endswith("; save torch.save(model.state_dict(), ...) or safetensors")
        assert "\n" not in str(caught.value)
        assert not exploded.exists()
    assert "(its pickle wants to call oat_dist.models.lightweight.Lightweight)" in str(caught.value)
    path.write_bytes(pickle.dumps(Explosive(exploded)))
    pickle.loads(path.read_bytes())  # it does go off
    assert exploded.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds no state dict but a list; save model.state_dict()"),
        ({}, "holds no state dict but a dict"),
        ({"model": {}}, "holds no state dict but a dict"),
        (
            {"weights": {"a": torch.zeros(1)}},
            "not a state dict: 'weights' is a dict; save model.state_dict() alone, or",
        ),
        ({3: torch.zeros(1)}, "not a state dict: 3 is a Tensor"),
    ],
)
def test_what_torch_saved_otherwise(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(DataError) as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_weights_files_that_are_none(tmp_path: Path) -> None:
    path, old = tmp_path / "weights.safetensors", tmp_path / "weights.pth"
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"no such weights file \(model.weights\); give a file, or 'pretrained'"):
            build_model("lightweight", 10, str(place))
    source = build_model("lightweight", 10)
    whole = Path(save(tmp_path, source)).read_bytes()
    torch.save(source.state_dict(), old)
    old_whole = old.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a safetensors file"):
            build_model("lightweight", 10, str(path))
    for content in (b"", old_whole[:100], old_whole[: len(old_whole) // 2], old_whole[:-1], whole):
        old.write_bytes(content)
        with pytest.raises(DataError, match=r"not a plain state dict \(damaged, or no file of torch.save\)"):
            build_model("lightweight", 10, str(old))
    for name in ("weights.npz", "weights", "weights.ckpt"):
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(DataError, match=r"takes .safetensors, or a PyTorch state dict in .pth, .pt, .bin, .tar"):
            build_model("lightweight", 10, str(tmp_path / name))


# Real files.


@pytest.mark.parametrize(
    ("name", "file", "head"),
    [
        ("squeezenet1_1", "squeezenet1_1.safetensors", "classifier.1"),
        ("timm/tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors", "classifier"),
    ],
)
def test_published_weights(name: str, file: str, head: str) -> None:
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip(f"set OAT_TEST_DATA to the folder that holds {file}")
    path = Path(folder) / file
    tensors = load_file(path)
    model = build_model(name, 2, image_size=64)
    assert load_weights(model, name, path, 64) == LoadedWeights(str(path), False, len(tensors) - 2)
    body = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}
    assert len(body) == len(tensors) - 2
    assert all(torch.equal(value, tensors[key]) for key, value in body.items())
    whole = build_model(name.upper().removeprefix("TIMM/"), 1000)  # capitals do not matter
    assert load_weights(whole, name, path).head_loaded
    with pytest.raises(DataError, match="these weights are of another network"):
        build_model("resnet18", 2, str(path))
