"""Networks by name, each ending in a head that computes in fp32.

Under autocast a bf16 head would round its outputs to steps of C/256 where targets reach C - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist.errors import ConfigError, DataError

__all__ = ["Fp32Conv2d", "Fp32Linear", "Lightweight", "build_model", "norms_frozen", "takes_single_samples"]


class Fp32Linear(nn.Linear):
    """A linear layer that computes in its weights' precision, also inside autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class Fp32Conv2d(nn.Conv2d):
    """A convolution that computes in its weights' precision, also inside autocast: SqueezeNet's head."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class Lightweight(nn.Module):
    """The paper's lightweight net for 32x32 RGB (section 3.2): two convolutions of 6 and 16 kernels of 5x5, each
    with ReLU and 2x2 max-pooling, then fully connected layers of 128, 64 and C outputs. 63,106 parameters at C = 10."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            Fp32Linear(64, num_classes),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.classifier(self.features(images_BCHW))


def build_model(name: str, num_classes: int, weights: str | None = None, image_size: int | None = None) -> nn.Module:
    """A new network with `num_classes` outputs; random numbers come from torch's global generator.

    Raises:
        ConfigError: unknown name, or a network that does not take images of this size.
        DataError: weights that cannot be read or do not fit.
    """
    if name == "lightweight":
        if image_size not in (None, 32):
            raise ConfigError(f"model.name=lightweight takes 32x32 images, not data.image_size={image_size}")
        model: nn.Module = Lightweight(num_classes)
    else:
        model = _torchvision(name, num_classes, image_size)
        _replace_head(model)
        if image_size is not None:
            _try_image(model, name, image_size)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model


def _torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        import difflib

        close = difflib.get_close_matches(name, ["lightweight", *classifiers], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "use lightweight or a name of torchvision.models"
        raise ConfigError(f"model.name={name!r} is unknown; {hint}")
    extra: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}  # its position embedding is made for one size
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    except AssertionError as error:
        raise ConfigError(f"model.name={name} does not take data.image_size={image_size}: {error}") from error
    if isinstance(model, torchvision.models.SqueezeNet):
        # It ends in a ReLU, but OAT's targets reach down to -1: all outputs would die at zero (measured).
        model.classifier[2] = nn.Identity()
    return model


def _head(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the layer that gives the class outputs: the last linear one, or SqueezeNet's convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        found = [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return found[-1]
    raise AssertionError("a classifier without weights")


def _replace_head(model: nn.Module) -> None:
    path, old = _head(model)
    head: nn.Module
    if isinstance(old, nn.Linear):
        head = Fp32Linear(old.in_features, old.out_features, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1) and old.bias is not None
        head = Fp32Conv2d(old.in_channels, old.out_channels, kernel_size=1)
    head.load_state_dict(old.state_dict())  # keeps the architecture's own initialisation
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)


def _try_image(model: nn.Module, name: str, image_size: int) -> None:
    """One image through the new network: some run out of pixels on the way, or take one size only."""
    model.eval()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"model.name={name} does not take data.image_size={image_size} ({reason}); most networks are made for 224"
        ) from error
    finally:
        model.train()


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such weights file (model.weights)")
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file ({error}); model.weights takes safetensors only") from error
    own = model.state_dict()
    unknown = sorted(set(given) - set(own))
    misshapen = [key for key, value in given.items() if key in own and value.shape != own[key].shape]
    head = _head(model)[0] + "."
    missing = sorted(key for key in set(own) - set(given) if not key.startswith(head))
    # Only the head, whose first dimension is the class count, may differ or be absent.
    body = [key for key in misshapen if not key.startswith(head) or given[key].shape[1:] != own[key].shape[1:]]
    if unknown or body or missing:
        first = (unknown or body or missing)[0]
        why = "is not in the network" if unknown else "has another shape" if body else "is missing"
        raise DataError(f"{path}: these weights are of another network: {first} {why}; check model.name")
    model.load_state_dict({key: value for key, value in given.items() if key not in misshapen}, strict=False)


def takes_single_samples(network: nn.Module, image_size: int) -> bool:
    """Whether the network can train on a batch of one: BatchNorm over 1x1 maps has nothing to estimate from."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return True
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.train()(torch.zeros(1, 3, image_size, image_size))
    except ValueError:
        return False
    finally:
        network.load_state_dict(before)
    return True


@contextmanager
def norms_frozen(network: nn.Module, frozen: bool) -> Iterator[None]:
    """Keep BatchNorm out of a stand-in's forward pass: it must not enter the running statistics."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)] if frozen else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
