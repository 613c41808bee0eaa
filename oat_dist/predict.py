"""From a checkpoint to answers: `OATClassifier`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from oat_dist.anchor import invert
from oat_dist.checkpoint import Checkpoint, find_checkpoint
from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.errors import CheckpointError, DataError
from oat_dist.models import build_model
from oat_dist.objectives import oat_scores

__all__ = ["OATClassifier", "load_network", "pipeline_of", "project_to_simplex"]


def load_network(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any], Tensor | None]:
    """The network on the CPU in eval mode, its card (model.json), and the stored anchor (C,) if it has one.

    Raises:
        CheckpointError: the weights do not fit the network that the card names.
    """
    card = checkpoint.json("model.json")
    network = build_model(card["name"], len(card["classes"]), image_size=card["image_size"])
    try:
        network.load_state_dict(checkpoint.tensors("model.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.folder}: the weights do not fit {card['name']}: {error}") from error
    anchor_C = None
    if card["objective"] == "oat":
        anchor_C = checkpoint.tensors("anchor.safetensors")["anchor"]
    return network.eval(), card, anchor_C


def pipeline_of(card: dict[str, Any]) -> ImagePipeline:
    """What is done to an image before the network of this card (model.json) sees it."""
    size, crop = card["image_size"], card.get("crop", "squash")
    return ImagePipeline(size, crop, crop_fraction=card.get("crop_fraction", 0.875))


def project_to_simplex(scores_BC: Tensor) -> Tensor:
    """The nearest probabilities (B, C) to scores (B, C) in the Euclidean sense; the order of classes is kept.

    With a fixed anchor the optimum of the OAT loss is s = p(y|x), so this is the estimate's repair, not a softmax.
    """
    sorted_BC = scores_BC.sort(dim=1, descending=True).values
    excess_BC = sorted_BC.cumsum(dim=1) - 1
    rank_C = torch.arange(1, scores_BC.shape[1] + 1, device=scores_BC.device, dtype=scores_BC.dtype)
    support_B = (sorted_BC * rank_C > excess_BC).sum(dim=1, keepdim=True)
    threshold_B1 = excess_BC.gather(1, support_B - 1) / support_B
    return (scores_BC - threshold_B1).clamp(min=0)


class OATClassifier:
    """A trained classifier: images in, labels and probabilities out.

    The default protocol, "stored", answers each image by itself, whatever it is batched with. "batch" uses the
    images of one `predict` call as the anchor set, as the paper does; "single" each image alone. A network trained
    with cross-entropy alone has softmax probabilities whatever the protocol.

    Attributes:
        classes: class names by label.
    """

    def __init__(
        self,
        network: nn.Module,
        card: dict[str, Any],
        stored_anchor_C: Tensor | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.card = card
        self.classes: list[str] = card["classes"]
        self.stored_anchor_C = stored_anchor_C
        self._pipeline = pipeline_of(card)
        self._normalise = Normalise(card["mean"], card["std"], self.device)

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: torch.device | str | None = None) -> OATClassifier:
        """Load a run folder (its newest valid checkpoint) or one of its ``checkpoints/step-<n>`` folders.

        Args:
            device: default: the first GPU where there is one, else the CPU.

        Raises:
            CheckpointError: no valid checkpoint there.
        """
        network, card, anchor_C = load_network(find_checkpoint(Path(path)))
        return cls(network, card, anchor_C, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def predict(self, images: Any, protocol: str = "stored", batch_size: int = 64) -> tuple[list[int], Tensor]:
        """Labels (a list of N class indices) and probabilities (N, C) in float64.

        Args:
            images: one image or a sequence: a path, file content as bytes, a PIL image, or a uint8 array or tensor
                (H, W, 3).
            protocol: "stored", "single" or "batch" (the images of this call share an anchor).
            batch_size: images in one forward pass; never changes the answer under "stored" and "single".

        Raises:
            DataError: an image that cannot be read, naming it.
        """
        if protocol not in ("stored", "single", "batch"):
            raise ValueError(f"protocol must be stored, single or batch, not {protocol!r}")
        if isinstance(images, (str, bytes, Path, Image.Image)) or getattr(images, "ndim", 0) == 3:
            images = [images]
        logits = [self._logits(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        if not logits:
            return [], torch.zeros(0, len(self.classes), dtype=torch.float64)
        logits_NC = torch.cat(logits).double()
        if self.card["objective"] != "oat":
            probabilities_NC = logits_NC.softmax(dim=1)
            return probabilities_NC.argmax(dim=1).tolist(), probabilities_NC
        if protocol == "stored":
            assert self.stored_anchor_C is not None
            scores_NC = invert(logits_NC, self.stored_anchor_C.double())
        else:
            group = 1 if protocol == "single" else None
            scores_NC = oat_scores(logits_NC, self.card["center"], self.card["floor"], group)
        return scores_NC.argmax(dim=1).tolist(), project_to_simplex(scores_NC)

    @torch.inference_mode()
    def _logits(self, images: Sequence[Any]) -> Tensor:
        images_BHWC = np.stack([self._pipeline.whole(_as_rgb(image)) for image in images])
        return self.network(self._normalise(torch.from_numpy(images_BHWC))).cpu()


def _as_rgb(image: Any) -> np.ndarray:
    """Whatever a user calls an image, as uint8 (H, W, 3)."""
    if isinstance(image, (str, Path)):
        try:
            return decode_rgb(Path(image).read_bytes())
        except OSError as error:
            raise DataError(f"{image}: cannot be read ({error.strerror})") from error
        except ImageError as error:
            raise DataError(f"{image}: not an image that can be decoded: {error}") from error
    if isinstance(image, bytes):
        try:
            return decode_rgb(image)
        except ImageError as error:
            raise DataError(f"bytes that cannot be decoded as an image: {error}") from error
    if isinstance(image, Image.Image):
        try:
            return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes on first use
            raise DataError(f"a PIL image that cannot be decoded: {error}") from error
    array = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise DataError(f"an image array must be uint8 of shape (H, W, 3), not {array.dtype} {array.shape}")
    return array
