"""`model.weights`: from a file's tensors to a network's, or a refusal that says what does not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from oat_dist.errors import DataError
from oat_dist.models.catalog import FOREIGN_ERRORS, Entry, load_timm, resolve, timm_size
from oat_dist.models.heads import head_paths
from oat_dist.models.state_dicts import read_state_dict

__all__ = ["LoadedWeights", "load_weights"]


@dataclass(frozen=True)
class LoadedWeights:
    """What came from a file: whether the head did too, and how many tensors (parameters and buffers)."""

    source: str
    head_loaded: bool
    tensors: int


def load_weights(model: nn.Module, name: str, path: Path | str, image_size: int | None = None) -> LoadedWeights:
    """Fill a network of `build_model(name, ...)` from a file; nothing is changed unless all of it fits.

    A head of another class count, or none, is left out: the network keeps its own, or a smaller start where that is
    large. Position embeddings made for another image size are interpolated, by torchvision's function or timm's
    checkpoint filter.

    Args:
        path: a file for `read_state_dict`, such as `fetch_weights` gives.
        image_size: what the network was built for.

    Raises:
        DataError: a file that cannot be read, or holds another network.
    """
    path, entry = Path(path), resolve(name)
    given, own = read_state_dict(path), model.state_dict()
    heads = head_paths(model)
    if entry.source == "torchvision":
        given = _as_torchvision(model, given, image_size)
    problem = _misfit(given, own, heads)
    if problem is not None and entry.source == "timm":
        converted = _as_timm(entry, given, heads, image_size)
        if converted is not None:
            given, problem = converted, _misfit(converted, own, heads)
    if problem is not None:
        raise DataError(f"{path}: these weights are of another network: {problem}; check model.name")
    in_head = [key for key in own if key.startswith(_prefixes(heads))]
    head_loaded = all(key in given and given[key].shape == own[key].shape for key in in_head)
    taken = {key: value for key, value in given.items() if head_loaded or key not in in_head}
    model.load_state_dict(taken, strict=False)
    if not head_loaded:
        _calm(model, heads)
    return LoadedWeights(str(path), head_loaded, len(taken))


def _calm(model: nn.Module, heads: list[str]) -> None:
    """Let a new head on trained features start small.

    EfficientNets draw theirs from +-1/sqrt(C): with few classes the first outputs are in the tens, and undoing them
    wrecks the features (measured, Lite0 on two classes: 61 % after three epochs).
    """
    for path in heads:
        head = model.get_submodule(path)
        assert isinstance(head, (nn.Linear, nn.Conv2d))
        if head.weight.std() > head.weight[0].numel() ** -0.5:
            head.reset_parameters()


def _prefixes(heads: list[str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in heads)


def _misfit(given: dict[str, Tensor], own: dict[str, Tensor], heads: list[str]) -> str | None:
    """The first thing that keeps these tensors out of the network."""
    head = _prefixes(heads)
    for key in sorted(set(given) - set(own)):
        return f"{key} is not in the network"
    for key, value in given.items():
        # Only the head, whose first dimension is the class count, may differ.
        if value.shape != own[key].shape and not (key.startswith(head) and value.shape[1:] == own[key].shape[1:]):
            return f"{key} has another shape"
    for key in sorted(set(own) - set(given)):
        # Files from before 2018 do not count batches; torch then starts at none.
        if not key.startswith(head) and not key.endswith(".num_batches_tracked"):
            return f"{key} is missing"
    return None


def _as_torchvision(model: nn.Module, given: dict[str, Tensor], image_size: int | None) -> dict[str, Tensor]:
    """What torchvision's own loaders do to its published files."""
    # DenseNet's layers had dots in their names once.
    given = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key): given[key] for key in given}
    if getattr(model, "aux_logits", True) is False:  # GoogLeNet and Inception, built without auxiliary classifiers
        given = {key: value for key, value in given.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    position = given.get("encoder.pos_embedding")
    if (
        isinstance(model, VisionTransformer)
        and position is not None
        and position.shape != model.encoder.pos_embedding.shape
    ):
        try:
            given = dict(interpolate_embeddings(model.image_size, model.patch_size, given))
        except ValueError:  # of a grid that is no square, or another shape altogether: _misfit names it
            return given
    return given


def _as_timm(
    entry: Entry, given: dict[str, Tensor], heads: list[str], image_size: int | None
) -> dict[str, Tensor] | None:
    """The tensors after timm's own filter (other layouts, other image sizes), out of a network it loaded strictly."""
    timm = load_timm()
    assert timm is not None
    in_file = given.get(f"{heads[0]}.weight")
    classes = timm.get_pretrained_cfg(entry.name).num_classes if in_file is None else len(in_file)
    overlay = {"state_dict": given, "num_classes": classes, "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            donor = timm.create_model(
                entry.name,
                pretrained=True,
                num_classes=classes,
                pretrained_cfg_overlay=overlay,
                **timm_size(entry.name, image_size),
            )
    except FOREIGN_ERRORS:
        return None
    return donor.state_dict()
