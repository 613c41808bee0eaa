"""Gradient checkpointing, and what makes a network's training random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from oat_dist.errors import ConfigError
from oat_dist.models import build_model, checkpoint_activations, freeze, randomness
from oat_dist.models.heads import last_layer, replace_heads


def small_vit(dropout: float) -> nn.Module:
    model = VisionTransformer(
        16, 4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=dropout, attention_dropout=dropout,
        num_classes=5,
    )  # fmt: skip
    replace_heads(model, [last_layer(model)], "small")
    nn.init.normal_(model.heads.head.weight)  # zero by design: no gradient would reach the body
    return model


def timm_vit(dropout: float) -> nn.Module:
    import timm

    return timm.create_model("test_vit", img_size=32, num_classes=5, proj_drop_rate=dropout, drop_path_rate=dropout)


def gradients_and_bytes(model: nn.Module, images_BCHW: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes of distinct storage that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images_BCHW).square().sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients, sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("make", "size"), [(small_vit, 16), (timm_vit, 32)])
def test_gradients_are_the_same_and_less_is_kept(make: Callable[[float], nn.Module], size: int, dropout: float) -> None:
    torch.manual_seed(0)
    model, images_BCHW = make(dropout).train(), torch.randn(4, 3, size, size)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    plain, plain_bytes = gradients_and_bytes(model, images_BCHW)
    checkpoint_activations(model, "vit")
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    light, light_bytes = gradients_and_bytes(model, images_BCHW)
    assert all(torch.equal(light[name], gradient) for name, gradient in plain.items())
    assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if "weight" in name)
    assert light_bytes < plain_bytes / 2
    with torch.inference_mode():
        assert model.eval()(images_BCHW).shape == (4, 5)
    torch.manual_seed(2)
    other = model.train()(images_BCHW)
    torch.manual_seed(3)
    assert torch.equal(other, model(images_BCHW)) == (dropout == 0)  # the control: dropout was at work


def test_frozen_blocks_may_be_checkpointed() -> None:
    model, images_BCHW = small_vit(0.0), torch.randn(2, 3, 16, 16)
    freeze(model, "conv_proj.* class_token encoder.pos_embedding encoder.layers.encoder_layer_0.*")
    checkpoint_activations(model, "vit_small")
    model(images_BCHW).sum().backward()
    assert model.encoder.layers[0].mlp[0].weight.grad is None
    assert model.encoder.layers[1].mlp[0].weight.grad is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "model.name=resnet18 does not offer gradient checkpointing; torchvision's vit_"),
        ("lightweight", "model.name=lightweight does not offer gradient checkpointing"),
        ("timm/test_resnet", "has BatchNorm, whose running statistics would count every batch twice"),
        ("timm/inception_next_atto", "has BatchNorm"),
        ("timm/vgg11", "model.name=timm/vgg11 does not offer gradient checkpointing"),
    ],
)
def test_networks_that_cannot_be_checkpointed(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checkpoint_activations(build_model(name, 3), name)
    assert message in str(caught.value)


def test_checkpointing_would_count_batches_twice() -> None:
    """Why BatchNorm is refused: timm's own switch, on a network that has it."""
    counts = []
    for switch in (False, True):
        model = build_model("timm/test_resnet", 3)
        model.set_grad_checkpointing(switch)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        counts.append(model.layer1[0].bn1.num_batches_tracked.item())
    assert counts == [1, 2]
    model = build_model("timm/test_resnet", 3)
    freeze(model, "body")
    checkpoint_activations(model, "timm/test_resnet")  # frozen whole, it counts nothing


# Randomness.


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("lightweight", []),
        ("wrn_28_10", ["BatchNorm"]),
        ("resnet18", ["BatchNorm"]),
        ("vit_b_32", []),
        ("squeezenet1_1", ["dropout"]),
        ("efficientnet_b0", ["BatchNorm", "dropout", "stochastic depth"]),
        ("convnext_tiny", ["stochastic depth"]),
        ("swin_t", ["stochastic depth"]),
        ("timm/test_vit", []),
        ("timm/test_resnet", ["BatchNorm"]),
        ("timm/swin_tiny_patch4_window7_224", ["stochastic depth"]),
    ],
)
def test_randomness(name: str, sources: list[str]) -> None:
    with torch.device("meta"):
        assert randomness(build_model(name, 3)) == sources


def test_randomness_of_rates() -> None:
    import timm
    import torchvision

    assert randomness(small_vit(0.1)) == ["dropout"]
    assert randomness(nn.MultiheadAttention(4, 2, dropout=0.1)) == ["dropout"]
    assert randomness(nn.MultiheadAttention(4, 2)) == []
    assert randomness(nn.Dropout2d(0.0)) == []
    with torch.device("meta"):
        assert randomness(torchvision.models.densenet121(drop_rate=0.2)) == ["BatchNorm", "dropout"]
        assert randomness(torchvision.models.swin_t(attention_dropout=0.1)) == ["dropout", "stochastic depth"]
        assert randomness(timm.create_model("test_vit", drop_path_rate=0.1)) == ["stochastic depth"]
        assert randomness(timm.create_model("test_vit", patch_drop_rate=0.1)) == ["dropout"]
        assert randomness(timm.create_model("test_resnet", drop_block_rate=0.1)) == ["BatchNorm", "dropout"]
        assert randomness(timm.create_model("test_efficientnet", drop_rate=0.1)) == ["BatchNorm", "dropout"]
    model = build_model("resnet18", 3)
    freeze(model, "body")
    assert randomness(model) == []
    assert randomness(build_model("resnet18", 3).eval()) == []
