"""From a checkpoint to answers: `OATClassifier`."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oat_dist.answers import AnswerHead, project_to_simplex
from oat_dist.calibration import prior_key, read_temperature
from oat_dist.checkpoint import Checkpoint, find_checkpoint
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.errors import CheckpointError, ConfigError, DataError
from oat_dist.fp32 import exact_fp32
from oat_dist.hub import check_login, fetch, is_hub_id, push, write_page
from oat_dist.inference.images import as_rgb, is_single
from oat_dist.objectives import oat_scores
from oat_dist.portable import (
    Description,
    build_network,
    is_portable,
    new_folder,
    read_description,
    read_network,
    write_portable,
)
from oat_dist.priors import Prior, anchor_for

__all__ = ["PROTOCOLS", "Answers", "OATClassifier", "load_network", "pipeline_of"]

PROTOCOLS = ("stored", "single", "batch")

# Outputs move a little with the company in a forward batch (some 1e-6 of them). Where the two best scores are nearer
# than this share of the largest, the image is computed once more, alone.
_NEAR = 1e-4


def load_network(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any], Tensor | None]:
    """The network on the CPU in eval mode, its card (model.json), and the stored anchor (C,) if it has one.

    Raises:
        CheckpointError: the weights do not fit the network that the card names.
    """
    card = checkpoint.json("model.json")
    needed = ("name", "classes", "image_size", "mean", "std", "objective", "center", "floor")
    if not isinstance(card, dict) or any(key not in card for key in needed):
        raise CheckpointError(f"{checkpoint.folder / 'model.json'}: damaged, it lacks one of {', '.join(needed)}")
    network = build_network(card, checkpoint.tensors("model.safetensors"), checkpoint.folder)
    anchor_C = None
    if card["objective"] == "oat":
        anchor_C = checkpoint.tensors("anchor.safetensors")["anchor"]
    return network, card, anchor_C


def pipeline_of(card: dict[str, Any]) -> ImagePipeline:
    """What is done to an image before the network of this card (model.json) sees it."""
    size, crop = card["image_size"], card.get("crop", "squash")
    return ImagePipeline(size, crop, crop_fraction=card.get("crop_fraction", 0.875))


@dataclass(frozen=True)
class Answers:
    """Of B images: the label (B,) int64, scores and probabilities (B, C) in float64."""

    labels_B: Tensor
    scores_BC: Tensor
    probabilities_BC: Tensor


class OATClassifier:
    """A trained classifier: images in, labels and probabilities out.

    The default protocol, "stored", answers each image by itself, whatever it is batched with. "batch" uses the
    images of one `predict` call as the anchor set, as the paper does; "single" each image alone. A network trained
    with cross-entropy alone has softmax probabilities whatever the protocol.

    Attributes:
        classes: class names by label.
        card: what the network is and how its images are prepared, as a checkpoint's model.json has it.
        prior: the class prior that scores are for: "training", unless another one was asked for.
        temperature: None unless calibrated.
        source: where the model comes from.
    """

    def __init__(
        self,
        network: nn.Module,
        card: dict[str, Any],
        stored_anchor_C: Tensor | None,
        device: torch.device | str = "cpu",
        *,
        prior: Prior = "training",
        temperature: float | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.card = card
        self.classes: list[str] = card["classes"]
        self.stored_anchor_C = stored_anchor_C
        self.temperature = temperature
        self.source = source or {}
        self.prior, anchor_C = anchor_for(prior, card, stored_anchor_C)
        self.head = AnswerHead(anchor_C, temperature)
        self.pipeline = pipeline_of(card)
        self.normalise = Normalise(card["mean"], card["std"], self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        device: torch.device | str | None = None,
        *,
        prior: Prior = "training",
        calibrated: bool = False,
    ) -> OATClassifier:
        """Load a run folder (its newest valid checkpoint) or one of its ``checkpoints/step-<n>`` folders.

        Args:
            device: default: the first GPU where there is one, else the CPU.
            prior: the class prior of the images to come, for a model trained with ``anchor.center=prior``: "training"
                (as they were in training), "balanced", ``"class=share,..."``, a JSON file, a mapping from class to
                share, or the shares in the order of the classes.
            calibrated: use the temperature that ``oat-dist evaluate --fit-temperature`` has found for this checkpoint
                and prior.

        Raises:
            CheckpointError: no valid checkpoint there, or none that is calibrated.
            ConfigError: a prior that the model cannot have.
        """
        path = Path(path)
        if is_portable(path):
            raise CheckpointError(f"{path}: an exported model, not a run; load it with OATClassifier.from_pretrained")
        checkpoint = find_checkpoint(path)
        network, card, anchor_C = load_network(checkpoint)
        key = prior_key(*anchor_for(prior, card, anchor_C))  # what cannot be is said before a missing temperature is
        temperature = read_temperature(checkpoint, key) if calibrated else None
        weights = checkpoint.json("manifest.json")["files"]["model.safetensors"]["sha256"]
        source = {
            "run": checkpoint.folder.absolute().parent.parent.name,
            "checkpoint": checkpoint.folder.name,
            "weights_sha256": weights,
            **({"ema": card["ema"]} if "ema" in card else {}),
        }
        return cls(
            network, card, anchor_C, device or _default_device(), prior=prior, temperature=temperature, source=source
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: Path | str,
        device: torch.device | str | None = None,
        *,
        revision: str | None = None,
        prior: Prior | None = None,
    ) -> OATClassifier:
        """Load what `save_pretrained` or ``oat-dist export`` wrote, from a folder or from the Hugging Face hub.

        Args:
            folder_or_id: a folder, or ``user/name`` on the hub where there is no such folder.
            revision: of the hub: branch, tag or commit.
            prior: another class prior than it was exported with, as in `from_checkpoint`.

        Raises:
            CheckpointError: nothing there, damaged, or it cannot be fetched.
            ConfigError: a prior that the model cannot have.
        """
        folder = Path(folder_or_id)
        if not folder.is_dir():
            if not is_hub_id(folder_or_id):
                raise CheckpointError(f"{folder_or_id}: no such folder, and not a name of the hub (user/name)")
            folder = fetch(str(folder_or_id), revision)
        description = read_description(folder)
        network = read_network(folder, description)
        device = device or _default_device()
        stored = description.stored_anchor
        anchor_C = None if stored is None else torch.tensor(stored, dtype=torch.float64)
        temperature, source = description.temperature, description.source
        used = description.used_anchor
        used_C = None if used is None else torch.tensor(used, dtype=torch.float64)
        # A file may have changed since, and a folder's own name for its shares ("given") says nothing by itself.
        as_described = prior is None or (prior == description.prior and not str(prior).endswith(".json"))
        if not as_described and not _same(anchor_for(prior or "training", description.card, anchor_C)[1], used_C):
            if temperature is not None:
                raise ConfigError(
                    f"{folder}: calibrated for the class prior {description.prior}, and its temperature is of no use "
                    "for another; export the run without --calibrated"
                )
            return cls(network, description.card, anchor_C, device, prior=prior or "training", source=source)
        model = cls(network, description.card, anchor_C, device, temperature=temperature, source=source)
        if used_C is not None:
            model.prior = description.prior
            model.head = AnswerHead(used_C, temperature)
        return model

    def save_pretrained(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the model to a folder of its own, for `from_pretrained`; all of it or nothing.

        Args:
            overwrite: an exported model that is there may go.

        Raises:
            OatError: there is something already, or it cannot be written.
        """
        with new_folder(Path(folder), overwrite=overwrite) as staging:
            self._write(staging)
        return Path(folder)

    def push_to_hub(self, hub_id: str, *, private: bool = False) -> str:
        """Upload the model to ``user/name`` on the Hugging Face hub; returns its URL.

        Raises:
            OatError: nobody is logged in, or it could not be uploaded.
        """
        check_login(hub_id)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), hub_id)
            return push(Path(folder), hub_id, private=private)

    def _write(self, folder: Path, hub_id: str = "USER/NAME") -> None:
        write_page(folder, self.describe(), hub_id)
        write_portable(folder, self.network, self.describe())

    def describe(self) -> Description:
        """What model.json says of this model."""
        stored, used = self.stored_anchor_C, self.head.anchor_C
        return Description(
            self.card,
            None if stored is None else stored.double().tolist(),
            self.prior,
            None if used is None else used.tolist(),
            self.temperature,
            self.source,
        )

    def predict(self, images: Any, protocol: str = "stored", batch_size: int = 64) -> tuple[list[int], Tensor]:
        """Labels (a list of N class indices) and probabilities (N, C) in float64.

        Args:
            images: one image or several: a path, file content as bytes, a PIL image, or a uint8 array or tensor
                (H, W, 3); greyscale, RGBA and tensors (3, H, W) too, see `oat_dist.inference.images`.
            protocol: "stored", "single" or "batch" (the images of this call share an anchor).
            batch_size: images in one forward pass; never changes a label, nor a probability beyond rounding.

        Raises:
            DataError: an image that cannot be read, naming it.
        """
        self.check_protocol(protocol)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        stream = iter([images] if is_single(images) else images)
        labels: list[Tensor] = []
        rows: list[Tensor] = []
        joint = protocol == "batch" and self.card["objective"] == "oat"
        while batch := list(itertools.islice(stream, batch_size)):
            prepared_BSSC = np.stack([self.prepare(image) for image in batch])
            if joint:
                rows.append(self._logits(prepared_BSSC))
                continue
            answers = self.answer(prepared_BSSC, protocol)
            labels.append(answers.labels_B)
            rows.append(answers.probabilities_BC)
        if not rows:
            return [], torch.zeros(0, len(self.classes), dtype=torch.float64)
        if not joint:
            return torch.cat(labels).tolist(), torch.cat(rows)
        scores_NC = oat_scores(torch.cat(rows), self.card["center"], self.card["floor"])
        return scores_NC.argmax(dim=1).tolist(), project_to_simplex(scores_NC)

    def top(self, image: Any, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes of one image, best first, each with its probability.

        Raises:
            DataError: it cannot be read, or is not one image.
        """
        if not is_single(image):
            raise DataError("top() answers one image; use predict() for several")
        answers = self.answer(self.prepare(image)[None])
        best = answers.scores_BC[0].sort(descending=True, stable=True).indices[:k].tolist()
        return [(self.classes[label], float(answers.probabilities_BC[0, label])) for label in best]

    def check_protocol(self, protocol: str) -> None:
        """Raise ValueError for a protocol that there is not, or that does not go with prior or temperature."""
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be stored, single or batch, not {protocol!r}")
        if protocol != "stored" and (self.prior != "training" or self.temperature is not None):
            raise ConfigError(
                f"protocol {protocol} takes its anchor from the images: no prior, no temperature goes with it"
            )

    def prepare(self, image: Any) -> np.ndarray:
        """One image as the network's input wants it, uint8 (S, S, 3). May be called from many threads.

        Raises:
            DataError: as `predict`.
        """
        return self.pipeline.whole(as_rgb(image))

    def answer(self, prepared_BSSC: np.ndarray, protocol: str = "stored", group: int | None = 1) -> Answers:
        """Answers to a batch of prepared images, uint8 (B, S, S, 3), in one forward pass.

        Under "stored" and "single" an answer is that of the image alone: where its two best scores are so near that
        the rounding of a batch could swap them, it is computed alone.

        Args:
            group: protocol "batch": every so many share an anchor (None: all).
        """
        scores_BC, probabilities_BC = self._score(self._logits(prepared_BSSC), protocol, group)
        if len(prepared_BSSC) > 1 and protocol != "batch":
            for row in _near_ties(scores_BC).tolist():
                alone_1C = self._logits(prepared_BSSC[row : row + 1])
                scores_1C, probabilities_1C = self._score(alone_1C, protocol, group)
                scores_BC[row], probabilities_BC[row] = scores_1C[0], probabilities_1C[0]
        return Answers(scores_BC.argmax(dim=1), scores_BC, probabilities_BC)

    def _score(self, logits_BC: Tensor, protocol: str, group: int | None) -> tuple[Tensor, Tensor]:
        if protocol == "stored" or self.card["objective"] != "oat":
            return self.head(logits_BC)
        size = 1 if protocol == "single" else group
        scores_BC = oat_scores(logits_BC, self.card["center"], self.card["floor"], size)
        return scores_BC, project_to_simplex(scores_BC)

    @torch.no_grad()
    def _logits(self, prepared_BSSC: np.ndarray) -> Tensor:
        """Outputs (B, C) of the network in fp32, as float64 on the CPU."""
        writable_BSSC = np.require(prepared_BSSC, requirements=["C", "W"])  # as torch wants it
        with exact_fp32(self.device):
            outputs_BC = self.network(self.normalise(torch.from_numpy(writable_BSSC)))
        outputs_BC = outputs_BC.double().cpu()
        if not bool(torch.isfinite(outputs_BC).all()):
            raise CheckpointError(
                f"{self.card['name']}: outputs of the network are not finite; its weights are no good"
            )
        return outputs_BC


def _same(first_C: Tensor | None, second_C: Tensor | None) -> bool:
    if first_C is None or second_C is None:
        return first_C is second_C
    return torch.allclose(first_C, second_C, rtol=1e-9, atol=0.0)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _near_ties(scores_BC: Tensor) -> Tensor:
    """Rows whose two best scores are nearly equal."""
    if scores_BC.shape[1] < 2:
        return torch.zeros(0, dtype=torch.int64)
    best_B2 = scores_BC.topk(2, dim=1).values
    size_B = scores_BC.abs().amax(dim=1).clamp(min=1)
    return ((best_B2[:, 0] - best_B2[:, 1]) < _NEAR * size_B).nonzero()[:, 0]
