"""A trained model in two files, wherever they lie: ``model.safetensors`` (the network's state dict, nothing else) and
``model.json``, which says all that is needed to answer an image: `Description`, one schema for every export.

``model.json`` may come from strangers. It is checked key by key, and names a network, never code.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oat_dist.anchor import CENTERS
from oat_dist.errors import CheckpointError, OatError
from oat_dist.files import fsync_file, fsync_folder, sha256_file, write_atomic
from oat_dist.models import build_model

__all__ = [
    "DESCRIPTION_NAME",
    "FORMAT",
    "WEIGHTS_NAME",
    "Description",
    "build_network",
    "is_portable",
    "new_folder",
    "read_description",
    "read_network",
    "write_description",
    "write_portable",
]

DESCRIPTION_NAME, WEIGHTS_NAME = "model.json", "model.safetensors"
FORMAT, VERSION = "oat_dist-model", 1

_CROPS = {
    "squash": "the whole image, resized to image_size x image_size whatever its shape",
    "center_crop": (
        "the square in the middle, of side = max(1, round(min(width, height) * crop_fraction)) with halves to even, "
        "left = (width - side) // 2, top = (height - side) // 2, resized to image_size x image_size"
    ),
}
_RESIZE = "Pillow's resize, BILINEAR: antialiased when it shrinks; an image of the right size stays as it is"
_DECODING = (
    "stored pixels as 8-bit RGB; EXIF orientation not applied; alpha dropped; grey repeated; of 16 bits the upper 8"
)
_LARGEST_SIZE, _MOST_CLASSES = 8192, 1_000_000


@dataclass(frozen=True)
class Description:
    """What a model is and how its outputs become answers, without its weights.

    Attributes:
        card: as of a checkpoint (its model.json): name, classes, image_size, mean, std, crop, crop_fraction,
            objective, center, floor.
        stored_anchor: the mean training anchor, C numbers; None for a network trained with cross-entropy alone.
        prior: the class prior in words: "training", "balanced" or what was given.
        used_anchor: what scores are made with: the stored anchor, or the class prior in its place.
        temperature: fitted on held-out data; None: not calibrated.
        source: where it comes from: run, checkpoint, the SHA-256 of its weights. For people.
        weights_sha256: of the model.safetensors beside a description that was read; None: not known.
    """

    card: dict[str, Any]
    stored_anchor: list[float] | None
    prior: str = "training"
    used_anchor: list[float] | None = None
    temperature: float | None = None
    source: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None

    def to_json(self, **more: Any) -> dict[str, Any]:
        """The content of model.json; `more` is what an export adds: its files and how they were checked."""
        card, oat = self.card, self.card["objective"] == "oat"
        crop = card.get("crop", "squash")
        scores = "anchor * (logits + 1)" if oat else "logits"
        probabilities = "the nearest point of the simplex to the scores" if oat else "softmax(scores)"
        if self.temperature is not None:
            probabilities = f"softmax({'log(max(scores, 0.1 / classes))' if oat else 'scores'} / temperature)"
        return {
            "format": FORMAT,
            "version": VERSION,
            "network": card["name"],
            "classes": card["classes"],
            "preprocessing": {
                "decoding": _DECODING,
                "image_size": card["image_size"],
                "crop": crop,
                "crop_fraction": card.get("crop_fraction", 0.875) if crop == "center_crop" else None,
                "crop_rule": _CROPS[crop],
                "resize": _RESIZE,
                "layout": "uint8 (batch, height, width, 3)",
                "colour_order": "RGB",
                "mean": card["mean"],
                "std": card["std"],
                "normalisation": "(x / 255 - mean) / std, then (batch, 3, height, width); inside exported graphs",
            },
            "answer": {
                "objective": card["objective"],
                "protocol": "stored" if oat else "argmax",
                "center": card["center"],
                "floor": card["floor"],
                "stored_anchor": self.stored_anchor,
                "prior": self.prior if oat else None,
                "anchor": self.used_anchor,
                "temperature": self.temperature,
                "scores": scores,
                "labels": "argmax(scores), an index of classes",
                "probabilities": probabilities,
            },
            "source": self.source,
            **more,
        }

    @classmethod
    def from_json(cls, values: Any, path: Path | str = DESCRIPTION_NAME) -> Description:
        """`values` as `to_json` wrote them.

        Raises:
            CheckpointError: another kind of file, another version, or a key that is missing or impossible.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not the description of an exported model")
        if values.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: version {values.get('version')!r} of the format, and this oat_dist reads {VERSION}; update it"
            )
        try:
            return cls._checked(values)
        except KeyError as error:
            raise CheckpointError(f"{path}: damaged, {error.args[0]!r} is missing; export the model again") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); export the model again") from error

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> Description:
        pixels, answer = values["preprocessing"], values["answer"]
        classes = values["classes"]
        _demand(
            isinstance(classes, list)
            and 0 < len(classes) <= _MOST_CLASSES
            and all(isinstance(name, str) for name in classes),
            "classes must be names",
        )
        size, crop, fraction = pixels["image_size"], pixels["crop"], pixels["crop_fraction"]
        _demand(type(size) is int and 0 < size <= _LARGEST_SIZE, f"image_size {size!r}")
        _demand(crop in _CROPS, f"crop {crop!r}")
        _demand((crop == "center_crop") == (fraction is not None), f"crop_fraction {fraction!r}")
        _demand(fraction is None or 0 < _number(fraction) <= 1, f"crop_fraction {fraction!r}")
        objective, center, floor = answer["objective"], answer["center"], _number(answer["floor"])
        _demand(objective in ("oat", "cross_entropy"), f"objective {objective!r}")
        _demand(center in CENTERS, f"center {center!r}")
        _demand(0 <= floor * len(classes) < 1, f"floor {floor!r}")
        _demand(isinstance(values["network"], str), f"network {values['network']!r}")
        std = _numbers(pixels["std"], 3, "std")
        _demand(min(std) > 0, "std must be positive")
        temperature = answer["temperature"]
        _demand(temperature is None or _number(temperature) > 0, f"temperature {temperature!r}")
        _demand(isinstance(values["source"], dict), "source")
        anchors: dict[str, list[float] | None] = {"stored_anchor": None, "anchor": None}
        if objective == "oat":
            anchors = {name: _numbers(answer[name], len(classes), name) for name in anchors}
            _demand(isinstance(answer["prior"], str), f"prior {answer['prior']!r}")
        card = {
            "name": values["network"],
            "classes": classes,
            "image_size": size,
            "mean": _numbers(pixels["mean"], 3, "mean"),
            "std": std,
            "crop": crop,
            "objective": objective,
            "center": center,
            "floor": floor,
        }
        if fraction is not None:
            card["crop_fraction"] = float(fraction)
        return cls(
            card,
            anchors["stored_anchor"],
            answer["prior"] if objective == "oat" else "training",
            anchors["anchor"],
            None if temperature is None else float(temperature),
            values["source"],
            values["files"][WEIGHTS_NAME]["sha256"] if WEIGHTS_NAME in values.get("files", {}) else None,
        )


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _number(value: Any) -> float:
    _demand(type(value) in (int, float) and math.isfinite(value), f"{value!r} is not a number")
    return float(value)


def _numbers(values: Any, count: int, what: str) -> list[float]:
    _demand(isinstance(values, list) and len(values) == count, f"{what} must be {count} numbers")
    return [_number(value) for value in values]


def is_portable(folder: Path) -> bool:
    """Whether a folder holds the description of an exported model (of whatever version)."""
    try:
        values = json.loads((folder / DESCRIPTION_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def read_description(folder: Path) -> Description:
    """The description in an exported folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / DESCRIPTION_NAME
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no exported model, {DESCRIPTION_NAME} is missing; see oat-dist export"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export the model again") from error
    return Description.from_json(values, path)


def write_description(folder: Path, description: Description, **more: Any) -> None:
    """Write model.json, with size and SHA-256 of every other file in `folder`; `more` as of `Description.to_json`."""
    others = sorted(path for path in folder.iterdir() if path.name != DESCRIPTION_NAME)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in others}
    values = description.to_json(files=files, **more)
    try:
        data = json.dumps(values, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a class name of no valid text, from a file system: JSON can hold it in ASCII
        data = json.dumps(values, indent=1).encode()
    write_atomic(folder / DESCRIPTION_NAME, data + b"\n")


def build_network(card: Mapping[str, Any], weights: Mapping[str, Tensor], where: Path | str) -> nn.Module:
    """The network that a card names, with these weights, on the CPU in eval mode.

    Raises:
        CheckpointError: the weights do not fit it, or there is no such network.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and thrown away
            network = build_model(card["name"], len(card["classes"]), image_size=card["image_size"])
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the weights do not fit {card['name']}: {_first_line(error)}") from error
    except OatError as error:
        raise CheckpointError(f"{where}: its network cannot be built: {error}") from error
    return network.eval()


def read_network(folder: Path, description: Description) -> nn.Module:
    """The network of an exported folder, on the CPU in eval mode.

    Raises:
        CheckpointError: there are no weights, or they are damaged or do not fit.
    """
    path = folder / WEIGHTS_NAME
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no {WEIGHTS_NAME}; export the model with --format portable") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({_first_line(error)}); export the model again") from error
    if description.weights_sha256 not in (None, sha256_file(path)):
        raise CheckpointError(
            f"{path}: damaged (its SHA-256 is not that of {DESCRIPTION_NAME}); export the model again"
        )
    return build_network(description.card, weights, folder)


def write_portable(folder: Path, network: nn.Module, description: Description) -> None:
    """Write model.safetensors and model.json."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).chmod(0o644)  # safetensors lets its owner alone read it
    write_description(folder, description)


@contextlib.contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `output`, renamed to it at the end of the block; after an error nothing is left.

    Args:
        overwrite: an exported model that lies at `output` is replaced; anything else there is never touched.

    Raises:
        OatError: there is something already, or nothing can be written there.
    """
    _refuse_taken(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
        staging.chmod(0o755)
        old = staging.with_name(staging.name.replace(".tmp-", ".old-"))
    except OSError as error:
        raise OatError(f"{output}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield staging
        _refuse_taken(output, overwrite)
        for path in staging.iterdir():
            fsync_file(path)
        fsync_folder(staging)
        _put(staging, output, old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, output: Path, old: Path) -> None:
    """Let `output` be what is in `staging`, and what was there go."""
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except BaseException:  # Ctrl-C, too
        if old.exists():
            old.rename(output)
        raise
    fsync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


_WRITTEN = {"README.md", DESCRIPTION_NAME, WEIGHTS_NAME, "model.onnx", "model.onnx.data", "model.pt2"}


def _refuse_taken(output: Path, overwrite: bool) -> None:
    if not output.name or output.name == "..":
        raise OatError(f"{output}: give a new folder to write to")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OatError(
            f"{output}: is there already; choose another folder, or replace an exported model with --overwrite"
        )
    if output.is_symlink() or not is_portable(output):
        raise OatError(f"{output}: is there and is not an exported model, so it is not replaced; choose another folder")
    others = sorted(path.name for path in output.iterdir() if path.name not in _WRITTEN)
    if others:
        raise OatError(f"{output}: holds {others[0]!r}, which no export wrote, so it is not replaced; move that first")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
