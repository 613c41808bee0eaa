"""One image through a new network, before any data is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist.errors import ConfigError
from oat_dist.models.catalog import FOREIGN_ERRORS

__all__ = ["takes_single_samples", "try_image"]


def try_image(model: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Some networks run out of pixels on the way, or take one size only, or give more than class outputs in training.

    Shapes say it all, so the images go through on the meta device: no arithmetic, no random number, no statistics.

    Raises:
        ConfigError: the network does not take images of this size, or does not answer with (batch, classes).
    """
    for training in (False, True):
        try:
            output = _shapes_only(model.train(training), image_size)
        except FOREIGN_ERRORS:  # there are operations without a meta kernel: let real numbers decide
            output = _for_real(model, name, image_size)
        finally:
            model.train()
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != num_classes:
            when = "while training" if training else "in evaluation"
            raise ConfigError(
                f"model.name={name} does not answer with one score per class {when} (several outputs, or a map); "
                "choose another network"
            )


def _shapes_only(model: nn.Module, image_size: int) -> object:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        images_BCHW = torch.zeros(2, 3, image_size, image_size, device="meta")
        return functional_call(model, {key: value.to("meta") for key, value in state.items()}, (images_BCHW,))


def _for_real(model: nn.Module, name: str, image_size: int) -> object:
    try:
        with torch.inference_mode():
            return model.eval()(torch.zeros(1, 3, image_size, image_size))
    except FOREIGN_ERRORS as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"model.name={name} does not take data.image_size={image_size} ({reason}); most networks are made for 224"
        ) from error


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
