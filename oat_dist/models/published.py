"""`model.weights=pretrained`: the weights that torchvision and timm publish, and the images they were made with."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision

from oat_dist.errors import ConfigError, DataError
from oat_dist.models.catalog import Entry, load_timm, resolve

__all__ = ["PRETRAINED", "Preprocessing", "expected_preprocessing", "fetch_weights"]

PRETRAINED = "pretrained"
_SECONDS = 20.0  # without an answer


@dataclass(frozen=True)
class Preprocessing:
    """Mean and standard deviation by channel (RGB in 0..1), and image size, that published weights were made with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


def expected_preprocessing(name: str) -> Preprocessing | None:
    """How the published weights of a network want their images; None where there are none.

    Raises:
        ConfigError: no such network.
    """
    entry = resolve(name)
    if entry.source == "torchvision":
        transforms = torchvision.models.get_model_weights(entry.name).DEFAULT.transforms()
        return Preprocessing(tuple(transforms.mean), tuple(transforms.std), transforms.crop_size[0])
    if entry.source == "timm":
        published = _timm_cfg(entry)
        if published.has_weights:
            return Preprocessing(tuple(published.mean), tuple(published.std), published.input_size[-1])
    return None


def fetch_weights(name: str, weights: str) -> Path:
    """The file behind `model.weights`: `weights` itself, or what is published for the network, from the cache of
    torch.hub or of the Hugging Face hub, else downloaded into it.

    In a distributed run call it on the local rank 0 of each machine first, then on the others: they find the cache
    filled.

    Raises:
        ConfigError: nothing is published for the network.
        DataError: no such file, or a download that failed, with what to do instead.
    """
    if weights != PRETRAINED:
        path = Path(weights)
        if not path.is_file():
            raise DataError(f"{path}: no such weights file (model.weights); give a file, or 'pretrained'")
        return path
    entry = resolve(name)
    if entry.source == "own":
        raise ConfigError(f"model.weights=pretrained: none are published for model.name={name}; give a file")
    if entry.source == "torchvision":
        return _by_url(torchvision.models.get_model_weights(entry.name).DEFAULT.url)
    published = _timm_cfg(entry)
    if published.custom_load or not published.has_weights:
        timm = load_timm()
        assert timm is not None
        tags = timm.list_pretrained(f"{entry.name.partition('.')[0]}.*")
        usable = [tag for tag in tags if not timm.get_pretrained_cfg(tag).custom_load]
        hint = f"choose {' or '.join(usable[:3])}" if usable else "give a file"
        raise ConfigError(f"model.weights=pretrained: timm has none for model.name={name} that torch reads; {hint}")
    if published.hf_hub_id:
        return _from_hub(published.hf_hub_id)
    return _by_url(published.url)


def _timm_cfg(entry: Entry) -> Any:
    timm = load_timm()
    assert timm is not None
    return timm.get_pretrained_cfg(entry.name)


def _by_url(url: str) -> Path:
    """The file in torch.hub's cache, downloaded and checked against the hash in its name if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = torch.hub.HASH_REGEX.search(path.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)  # torch sets none: a network that swallows packets would hang here
    try:
        torch.hub.download_url_to_file(url, str(path), expected and expected[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        raise DataError(
            f"{url}: cannot be downloaded ({_one_line(error)}); put the file at {path}, or give its place in "
            "model.weights"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def _from_hub(hub_id: str) -> Path:
    """The file in the cache of the Hugging Face hub, downloaded if it is not there."""
    import huggingface_hub as hub  # timm needs it

    repo, _, revision = hub_id.partition("@")
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        cached = hub.try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    url = hub.hf_hub_url(repo, names[0], revision=revision or None)
    try:
        for name in names:
            url = hub.hf_hub_url(repo, name, revision=revision or None)
            try:
                hub.get_hf_file_metadata(url, timeout=_SECONDS)  # at once; the download itself would retry for long
            except hub.errors.EntryNotFoundError:
                continue
            return Path(hub.hf_hub_download(repo, name, revision=revision or None))
    except Exception as error:  # of whichever HTTP client this version of the hub brings
        raise DataError(
            f"{url}: cannot be downloaded ({_one_line(error)}), and {hub.constants.HF_HUB_CACHE} does not hold it; "
            "download it elsewhere and give its place in model.weights"
        ) from error
    raise DataError(f"{url}: not there, nor {names[0]}; give a file in model.weights")


def _one_line(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__
