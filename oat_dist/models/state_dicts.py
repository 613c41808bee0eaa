"""Weights files: safetensors, or a PyTorch state dict read without running its pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from oat_dist.errors import DataError

__all__ = ["read_state_dict"]

_PYTORCH = (".pth", ".pt", ".bin", ".tar")  # .pth.tar
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's, torch.compile's


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, without the wrappings that training scripts put around them.

    Raises:
        DataError: no such file, not a state dict, or one whose pickle asks for more than tensors (it is not run).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such weights file (model.weights)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file ({error})") from error
    if path.suffix not in _PYTORCH:
        raise DataError(f"{path}: model.weights takes .safetensors, or a PyTorch state dict in {', '.join(_PYTORCH)}")
    return _unwrap(_torch_load(path), path)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what it raises at damaged files is not written down; UnpicklingError among others
        refused = re.search(r"GLOBAL (\S+)", str(error))
        why = f"its pickle wants to call {refused[1]}" if refused else "damaged, or no file of torch.save"
        raise DataError(
            f"{path}: not a plain state dict ({why}); save torch.save(model.state_dict(), ...) or safetensors"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no state dict but a {type(content).__name__}; save model.state_dict()")
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise DataError(
            f"{path}: not a state dict: {other[0]!r} is a {type(content[other[0]]).__name__}; save model.state_dict() "
            f"alone, or under one of {', '.join(_WRAPPERS)}"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)
