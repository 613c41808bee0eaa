"""Networks by name, each ending in a head that computes in fp32, and the weights they start from."""

from __future__ import annotations

from torch import nn

from oat_dist.models.activations import checkpoint_activations
from oat_dist.models.catalog import construct, resolve
from oat_dist.models.freezing import freeze
from oat_dist.models.heads import Fp32Conv2d, Fp32Linear, head_parameters, head_paths
from oat_dist.models.lightweight import Lightweight
from oat_dist.models.norms import norms_frozen, statistics_untouched
from oat_dist.models.published import PRETRAINED, Preprocessing, expected_preprocessing, fetch_weights
from oat_dist.models.randomness import randomness
from oat_dist.models.trial import takes_single_samples, try_image
from oat_dist.models.weights import LoadedWeights, load_weights
from oat_dist.models.wide_resnet import WideResNet

__all__ = [
    "PRETRAINED",
    "Fp32Conv2d",
    "Fp32Linear",
    "Lightweight",
    "LoadedWeights",
    "Preprocessing",
    "WideResNet",
    "build_model",
    "checkpoint_activations",
    "expected_preprocessing",
    "fetch_weights",
    "freeze",
    "head_parameters",
    "head_paths",
    "load_weights",
    "norms_frozen",
    "randomness",
    "statistics_untouched",
    "takes_single_samples",
]


def build_model(name: str, num_classes: int, weights: str | None = None, image_size: int | None = None) -> nn.Module:
    """A new network with `num_classes` outputs; random numbers come from torch's global generator.

    Under ``torch.device("meta")`` it is built without memory, for its names and shapes.

    Args:
        name: ``lightweight``, ``wrn_28_10``, or a classifier of torchvision or timm (see `resolve`).
        weights: a file, or ``pretrained``; callers who want to know what was loaded call `load_weights` themselves.
        image_size: pixels per side; networks made for one size are made for this one, and an image is tried.

    Raises:
        ConfigError: unknown name, or a network that does not take images of this size.
        DataError: weights that cannot be had, cannot be read or do not fit.
    """
    model = construct(resolve(name), num_classes, image_size)
    if image_size is not None:
        try_image(model, name, num_classes, image_size)
    if weights is not None:
        load_weights(model, name, fetch_weights(name, weights), image_size)
    return model
