"""Networks by name: their structure, their size, their fp32 head."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn

from oat_dist.errors import ConfigError
from oat_dist.models import Fp32Conv2d, Fp32Linear, Lightweight, WideResNet, build_model, head_parameters, head_paths
from oat_dist.models.trial import try_image


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network's names and shapes, without its memory."""
    with torch.device("meta"):
        return build_model(name, num_classes, image_size=image_size)


# Structure.


def test_the_lightweight_network_is_the_papers() -> None:
    model = build_model("lightweight", 10)
    assert isinstance(model, Lightweight)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "weight" in name}
    assert list(shapes.values()) == [(6, 3, 5, 5), (16, 6, 5, 5), (128, 400), (64, 128), (10, 64)]
    assert parameters(model) == 6 * 76 + 16 * 151 + 401 * 128 + 129 * 64 + 65 * 10 == 63_106
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert parameters(build_model("lightweight", 101)) == 63_106 + 65 * 91
    assert build_model("lightweight", 1, image_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 1)


def test_wrn_28_10_is_the_standard_one() -> None:
    model = on_meta("wrn_28_10", 10, image_size=32)
    assert isinstance(model, WideResNet)
    assert parameters(model) == 36_479_194
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 3 * 4 * 2 + 3  # the first, two in each of twelve blocks, and three shortcuts
    strided = [module.out_channels for module in convolutions if module.stride == (2, 2)]
    assert strided == [320, 320, 640, 640]  # first convolution and shortcut of groups two and three
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_the_wide_residual_block_activates_before_its_convolutions() -> None:
    """By hand: the shortcut starts from the activated input where it is a convolution, else from the raw one."""
    torch.manual_seed(0)
    model = WideResNet(3, depth=10, width=1).eval()
    images_BCHW = torch.randn(2, 3, 8, 8)
    x = model.conv1(images_BCHW)
    for group in model.groups:
        (block,) = group
        active = torch.relu(block.bn1(x))
        skip = x if block.shortcut is None else block.shortcut(active)
        x = skip + block.conv2(torch.relu(block.bn2(block.conv1(active))))
    by_hand = model.fc(torch.relu(model.bn(x)).mean((2, 3)))
    assert torch.equal(model(images_BCHW), by_hand)
    assert [block.shortcut is None for (block,) in model.groups] == [True, False, False]
    spread = {name: p.std().item() for name, p in model.named_parameters() if name.endswith("conv2.weight")}
    for name, parameter in model.named_parameters():
        if name in spread:
            assert spread[name] == pytest.approx((2 / (9 * parameter.shape[0])) ** 0.5, rel=0.05)  # He, by fan-out


@pytest.mark.parametrize(
    ("papers", "name", "size", "count"),
    [
        ("Lightweight", "lightweight", 32, 63_106 + 65 * 990),
        ("WRN-28-10", "wrn_28_10", 32, 36_479_194 + 641 * 990),
        ("ResNet-18", "resnet18", 224, 11_689_512),
        ("WRN-50-2", "wide_resnet50_2", 224, 68_883_240),
        ("ViT-L-16", "vit_l_16", 224, 304_326_632),
        ("EfficientNet-B1", "efficientnet_b1", 240, 7_794_184),
    ],
)
def test_the_papers_names_and_sizes(papers: str, name: str, size: int, count: int) -> None:
    model, same = on_meta(papers, 1000, size), on_meta(name, 1000, size)
    assert parameters(model) == count
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in same.state_dict().items()
    }
    assert len(head_paths(model)) == 1


def test_whose_network_it_is() -> None:
    assert type(on_meta("resnet18", 5)).__module__ == "torchvision.models.resnet"
    assert type(on_meta("torchvision/resnet18", 5)).__module__ == "torchvision.models.resnet"
    assert type(on_meta("timm/resnet18", 5)).__module__ == "timm.models.resnet"
    assert type(on_meta("resnet18d", 5)).__module__ == "timm.models.resnet"
    assert type(on_meta("timm/resnet18.tv_in1k", 5)).__module__ == "timm.models.resnet"
    assert type(on_meta("wide_resnet50_2", 5)).__module__ == "torchvision.models.resnet"


def test_initial_weights_follow_the_seed() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build_model("lightweight", 10).parameters())

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))


# Names and sizes that cannot be.


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("lightweight", 64, "model.name=lightweight takes 32x32 images, not data.image_size=64"),
        ("alexnet", 32, "model.name=alexnet does not take data.image_size=32 (Given input size: (256x1x1)"),
        ("vit_b_32", 100, "model.name=vit_b_32 does not take data.image_size=100: Input shape indivisible"),
        ("timm/vit_tiny_patch16_224", 8, "model.name=timm/vit_tiny_patch16_224 does not take data.image_size=8"),
        ("resnet81", None, "model.name='resnet81' is unknown; did you mean resnet18"),
        ("lightwieght", None, "model.name='lightwieght' is unknown; did you mean lightweight?"),
        ("WRN-28-1", None, "model.name='WRN-28-1' is unknown; did you mean wrn_28_10?"),
        ("swin_tinny_patch4_window7_224", None, "did you mean swin_tiny_patch4_window7_224"),
        ("timm/lightweight", None, "model.name='timm/lightweight' is unknown"),
        ("torchvision/resnet18d", None, "model.name='torchvision/resnet18d' is unknown; did you mean resnet18"),
        ("timm/resnet18.tv_in2k", None, "model.name='timm/resnet18.tv_in2k' is unknown; did you mean resnet18.tv_in1k"),
        ("qqqq", None, "unknown; use lightweight, wrn_28_10, or a name of torchvision.models or timm"),
        ("fcn_resnet50", None, "model.name='fcn_resnet50' is unknown"),  # torchvision's, but no classifier
        ("timm/qwen3_vit_88m_enc", None, "has no single classifying layer"),
        ("timm/levit_384_s8", None, "has no single classifying layer"),  # timm itself names one of its two heads
    ],
)
def test_networks_that_cannot_be(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(name, 10, image_size=size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TwoAnswers(nn.Module):
    """As distilled networks are: an extra output in training, or in evaluation a map."""

    def __init__(self, training: object, evaluation: object) -> None:
        super().__init__()
        self.answers = {True: training, False: evaluation}

    def forward(self, images_BCHW: Tensor) -> object:
        return self.answers[self.training]


def test_a_network_must_answer_with_scores() -> None:
    scores_BC = torch.zeros(2, 5)
    try_image(TwoAnswers(scores_BC, scores_BC), "x", 5, 32)
    for training, evaluation, when in (
        ((scores_BC, scores_BC), scores_BC, "while training"),
        (scores_BC, scores_BC[:, :, None, None], "in evaluation"),
        (scores_BC[:, :4], scores_BC, "while training"),
    ):
        model = TwoAnswers(training, evaluation)
        with pytest.raises(ConfigError, match=f"model.name=x does not answer with one score per class {when}"):
            try_image(model, "x", 5, 32)
        assert model.training


def test_without_timm() -> None:
    """In a process that cannot import it: torchvision's names do, and timm's say what to install."""
    script = """
import sys
from oat_dist.errors import ConfigError
from oat_dist.models import build_model
build_model("resnet18", 2)
print("timm" in sys.modules)  # importing it takes seconds that others need not wait
sys.modules["timm"] = None
for name in ("timm/resnet18", "swin_tiny_patch4_window7_224", "resnet81"):
    try:
        build_model(name, 2)
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    imported, first, second, third = done.stdout.splitlines()
    assert imported == "False"
    assert first == "model.name=timm/resnet18 needs timm; timm is not installed: pip install 'oat_dist[timm]'"
    assert second.startswith("model.name='swin_tiny_patch4_window7_224' is unknown; ")
    assert second.endswith("(more with timm: timm is not installed: pip install 'oat_dist[timm]')")
    assert third.startswith("model.name='resnet81' is unknown; did you mean resnet")


# The head.


@pytest.mark.parametrize(
    ("name", "size", "heads"),
    [
        ("lightweight", 32, ["classifier.5"]),
        ("resnet18", 32, ["fc"]),
        ("mobilenet_v3_small", 32, ["classifier.3"]),
        ("squeezenet1_1", 64, ["classifier.1"]),
        ("shufflenet_v2_x0_5", 32, ["fc"]),
        ("mnasnet0_5", 32, ["classifier.1"]),
        ("vit_b_32", 64, ["heads.head"]),
        ("timm/vit_tiny_patch16_224", 48, ["head"]),
        ("timm/swin_tiny_patch4_window7_224", 64, ["head.fc"]),
        ("timm/tf_efficientnet_lite0", 32, ["classifier"]),
        ("timm/pvt_v2_b0", 64, ["head"]),
        ("timm/test_resnet", 32, ["fc"]),
        ("timm/deit_tiny_distilled_patch16_224", 32, ["head", "head_dist"]),  # the output is their average
        ("timm/repvit_m1", 32, ["head.head.l", "head.head_dist.l"]),
        ("timm/volo_d1_224", 32, ["aux_head", "head"]),  # plus half the maximum over the patches
        ("timm/dla34", 64, ["fc"]),  # a 1x1 convolution
    ],
)
def test_the_head_computes_in_fp32_inside_autocast(name: str, size: int, heads: list[str]) -> None:
    model = build_model(name, 7, image_size=size)
    assert model.training
    fp32 = [path for path, module in model.named_modules() if isinstance(module, (Fp32Linear, Fp32Conv2d))]
    assert fp32 == head_paths(model) == heads
    assert [name.rpartition(".")[0] for name in head_parameters(model)] == [path for path in heads for _ in range(2)]
    seen: list[Tensor] = []
    for head in heads:
        model.get_submodule(head).register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits_BC = model.eval()(torch.zeros(2, 3, size, size))
    assert logits_BC.shape == (2, 7)
    assert {logits_BC.dtype, *(output.dtype for output in seen)} == {torch.float32}
    assert len(seen) == len(heads)


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
    import timm

    for name, head, theirs_too in (
        ("resnet18", "fc", torchvision.models.get_model),
        ("squeezenet1_1", "classifier.1", torchvision.models.get_model),
        ("mobilenet_v3_small", "classifier.3", torchvision.models.get_model),
        ("timm/test_vit", "head", timm.create_model),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            ours = build_model(name, 7).get_submodule(head).state_dict()
            torch.manual_seed(5)
            theirs = theirs_too(name.removeprefix("timm/"), num_classes=7).get_submodule(head).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_trying_an_image_leaves_random_numbers_and_statistics_alone() -> None:
    for name in ("mobilenet_v3_small", "timm/test_efficientnet"):
        states = []
        for size in (None, 32):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                model = build_model(name, 5, image_size=size)
                assert all(module.training for module in model.modules())
                states.append((model.state_dict(), torch.get_rng_state()))
        assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())
        assert torch.equal(states[0][1], states[1][1])


def test_channels_last_changes_the_layout_alone() -> None:
    torch.manual_seed(0)
    model, images_BCHW = build_model("squeezenet1_1", 3, image_size=64).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        plain_BC = model(images_BCHW)
        model.to(memory_format=torch.channels_last)
        assert model.features[0].weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images_BCHW.to(memory_format=torch.channels_last)), plain_BC)
