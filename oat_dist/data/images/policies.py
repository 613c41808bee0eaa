"""RandAugment (arXiv 1909.13719) and TrivialAugmentWide (2103.10158), as torchvision defines them.

The choice of operation, magnitude and sign is ours: by hash of (seed, epoch, sample id), with no generator that threads
would share. What an operation does to a Pillow image is torchvision's, to the pixel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from oat_dist.data.images.draws import RANDAUGMENT, TRIVIALAUGMENT, uniforms

__all__ = ["BINS", "OPERATIONS", "apply_operation", "magnitudes", "randaugment", "trivialaugment"]

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
BINS = 31  # magnitudes of each operation
NUM_OPS = 2  # RandAugment's, and its one magnitude
MAGNITUDE = 9

_UNSIGNED = ("Posterize", "Solarize")
_ENHANCERS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}


@functools.lru_cache(maxsize=256)
def magnitudes(operation: str, size: int, *, wide: bool) -> tuple[float, ...] | None:
    """The `BINS` magnitudes of an operation on images of size x size, without sign; None: it has none.

    Args:
        wide: TrivialAugmentWide's, else RandAugment's.
    """
    if operation in ("Identity", "AutoContrast", "Equalize"):
        return None
    if operation == "Posterize":
        return tuple((8 - (torch.arange(BINS) / ((BINS - 1) / (6 if wide else 4)))).round().tolist())
    if operation == "Solarize":
        return tuple(torch.linspace(1.0, 0.0, BINS).tolist())
    if operation.startswith("Translate"):
        most = 32.0 if wide else 150.0 / 331.0 * size
    elif operation.startswith("Shear"):
        most = 0.99 if wide else 0.3
    elif operation == "Rotate":
        most = 135.0 if wide else 30.0
    else:
        most = 0.99 if wide else 0.9
    return tuple(torch.linspace(0.0, most, BINS).tolist())


def apply_operation(image: Image.Image, operation: str, magnitude: float) -> Image.Image:
    """One operation at a magnitude with its sign; what comes in from outside the image is black."""
    match operation:
        case "Identity":
            return image
        case "ShearX":
            return _affine(image, (1.0, math.tan(math.atan(magnitude)), 0.0, 0.0, 1.0, 0.0))
        case "ShearY":
            return _affine(image, (1.0, 0.0, 0.0, math.tan(math.atan(magnitude)), 1.0, 0.0))
        case "TranslateX":
            return _affine(image, (1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0))
        case "TranslateY":
            return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))))
        case "Rotate":
            return image.rotate(magnitude, Image.Resampling.NEAREST)
        case "Posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            return ImageOps.solarize(image, math.ceil(255.0 * magnitude))  # inverts what is not below it
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
    return _ENHANCERS[operation](image).enhance(1.0 + magnitude)


def randaugment(images_BHWC: np.ndarray, ids_B: np.ndarray, seed: int, epoch: int) -> None:
    """`NUM_OPS` random operations at magnitude `MAGNITUDE` on each image, in place; uint8 (B, S, S, 3)."""
    draws_BN2 = uniforms(ids_B, seed, epoch, RANDAUGMENT, 2 * NUM_OPS).reshape(-1, NUM_OPS, 2)
    for slot, draws_N2 in enumerate(draws_BN2.tolist()):
        image = Image.fromarray(images_BHWC[slot])
        for choice, sign in draws_N2:
            image = _random_operation(image, choice, MAGNITUDE, sign, wide=False)
        images_BHWC[slot] = np.asarray(image)


def trivialaugment(images_BHWC: np.ndarray, ids_B: np.ndarray, seed: int, epoch: int) -> None:
    """One random operation at a random magnitude on each image, in place; uint8 (B, S, S, 3)."""
    for slot, (choice, level, sign) in enumerate(uniforms(ids_B, seed, epoch, TRIVIALAUGMENT, 3).tolist()):
        image = Image.fromarray(images_BHWC[slot])
        images_BHWC[slot] = np.asarray(_random_operation(image, choice, int(level * BINS), sign, wide=True))


def _random_operation(image: Image.Image, choice: float, level: int, sign: float, *, wide: bool) -> Image.Image:
    operation = OPERATIONS[int(choice * len(OPERATIONS))]
    levels = magnitudes(operation, image.width, wide=wide)
    magnitude = 0.0 if levels is None else levels[level]
    return apply_operation(image, operation, -magnitude if sign <= 0.5 and operation not in _UNSIGNED else magnitude)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
