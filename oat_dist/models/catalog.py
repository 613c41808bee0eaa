"""Which networks there are: our own two, torchvision's classifiers and timm's."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torchvision
from torch import nn

from oat_dist.errors import ConfigError
from oat_dist.models.heads import last_layer, replace_heads
from oat_dist.models.lightweight import Lightweight
from oat_dist.models.wide_resnet import WideResNet

__all__ = ["FOREIGN_ERRORS", "Entry", "construct", "load_timm", "resolve", "timm_size"]

_OWN = ("lightweight", "wrn_28_10")
# The paper's and other papers' spelling, lower case and without dashes.
_ALIASES = {"wrn_50_2": "wide_resnet50_2", "wrn_101_2": "wide_resnet101_2"} | {
    f"resnet_{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)
}
_GET_TIMM = "timm is not installed: pip install 'oat_dist[timm]'"

# What the code of networks raises at images and weights that it was not made for.
FOREIGN_ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, LookupError)


@dataclass(frozen=True)
class Entry:
    """A network by its own library's name; `given` is what the user called it."""

    source: Literal["own", "torchvision", "timm"]
    name: str
    given: str


def load_timm() -> ModuleType | None:
    """timm where it is installed. Imported on need: that takes seconds."""
    try:
        import timm
    except ImportError:
        return None
    return timm


def resolve(name: str) -> Entry:
    """Find a network by name; ``torchvision/NAME`` and ``timm/NAME`` say whose, else torchvision's goes first.

    Capitals and dashes do not matter: ``WRN-28-10``, ``ViT-L-16``. timm's may carry the tag of their weights.

    Raises:
        ConfigError: no such network, or timm is needed and not installed.
    """
    source, _, rest = name.partition("/") if name.startswith(("torchvision/", "timm/")) else ("", "", name)
    plain = rest.lower().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if source == "" and plain in _OWN:
        return Entry("own", plain, name)
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if source != "timm" and plain in classifiers:
        return Entry("torchvision", plain, name)
    timm = load_timm() if source != "torchvision" else None
    if source == "timm" and timm is None:
        raise ConfigError(f"model.name={name} needs timm; {_GET_TIMM}")
    if timm is not None and timm.is_model(plain):
        try:
            timm.get_pretrained_cfg(plain)
        except RuntimeError as error:  # an unknown tag
            tags = list(timm.list_pretrained(f"{plain.partition('.')[0]}.*"))
            raise ConfigError(f"model.name={name!r} is unknown; {_hint(plain, tags)}") from error
        return Entry("timm", plain, name)
    known = [] if source == "timm" else list(classifiers)
    if source == "":
        known += _OWN
    if timm is not None:
        known += timm.list_models()
    elif source == "" and not difflib.get_close_matches(plain, known, n=1, cutoff=0.85):
        raise ConfigError(f"model.name={name!r} is unknown; {_hint(plain, known)} (more with timm: {_GET_TIMM})")
    raise ConfigError(f"model.name={name!r} is unknown; {_hint(plain, known)}")


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"use {', '.join(_OWN)}, or a name of torchvision.models or timm"


def construct(entry: Entry, num_classes: int, image_size: int | None) -> nn.Module:
    """A new network with an fp32 head, not yet tried on an image.

    Raises:
        ConfigError: it does not take images of this size, or does not end in a layer that we can replace.
    """
    if entry.source == "own":
        if entry.name == "lightweight" and image_size not in (None, 32):
            raise ConfigError(f"model.name={entry.given} takes 32x32 images, not data.image_size={image_size}")
        return Lightweight(num_classes) if entry.name == "lightweight" else WideResNet(num_classes)
    build = _torchvision if entry.source == "torchvision" else _timm
    try:
        model, heads = build(entry.name, num_classes, image_size)
    except FOREIGN_ERRORS as error:
        if image_size is None or isinstance(error, ConfigError):
            raise
        reason = str(error).split("\n")[0]
        raise ConfigError(f"model.name={entry.given} does not take data.image_size={image_size}: {reason}") from error
    replace_heads(model, heads, entry.given)
    return model


def _torchvision(name: str, num_classes: int, image_size: int | None) -> tuple[nn.Module, list[str]]:
    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their published weights want the input scaled otherwise; a name is one network, with weights and without.
        extra = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}  # its position embedding is made for one size
    elif name.startswith("maxvit_") and image_size is not None:
        extra = {"input_size": (image_size, image_size)}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    if isinstance(model, torchvision.models.SqueezeNet):
        # It ends in a ReLU, but OAT's targets reach down to -1: all outputs would die at zero (measured).
        model.classifier[2] = nn.Identity()
    return model, [last_layer(model)]


def _timm(name: str, num_classes: int, image_size: int | None) -> tuple[nn.Module, list[str]]:
    timm = load_timm()
    assert timm is not None
    model = timm.create_model(name, num_classes=num_classes, **timm_size(name, image_size))
    paths = model.pretrained_cfg.get("classifier")
    heads = [paths] if isinstance(paths, str) else list(paths or [])
    layers = model.get_classifier() if hasattr(model, "get_classifier") else ()
    # Two heads whose average is the output work as one; timm must name both.
    if not heads or (isinstance(layers, (tuple, list)) and len(layers) > len(heads)):
        raise ConfigError(f"model.name=timm/{name} has no single classifying layer; choose another network")
    return model, heads


def timm_size(name: str, image_size: int | None) -> dict[str, int]:
    """What `timm.create_model` must be told of the image size: only networks made for one size take it."""
    timm = load_timm()
    assert timm is not None
    return {"img_size": image_size} if image_size is not None and timm.get_pretrained_cfg(name).fixed_input_size else {}
