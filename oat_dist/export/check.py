"""Whether an exported model answers as the original does: both are run, on the same images, one at a time.

Differences are judged against 1, or against the largest score of the image where that is more (a network trained with
cross-entropy alone, whose scores are its outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.data.index import ShardSet
from oat_dist.data.plan import EpochOrder
from oat_dist.data.storage import ShardReader
from oat_dist.errors import OatError
from oat_dist.export.formats import Runner
from oat_dist.predict import OATClassifier

__all__ = ["BOUND", "TIE", "Agreement", "compare", "noise", "split_images"]

BOUND = 1e-4  # of scores, and of probabilities where no temperature sharpens them
TIE = 1e-5  # two scores of the original nearer than this may swap
_TOGETHER = 32  # images that are also answered in one batch


@dataclass
class Agreement:
    """How far an exported model is from the original, over all images.

    Attributes:
        images: compared one at a time; some of them once more in a batch.
        different: labels that differ, beyond ties.
        ties: labels that differ where the original's two scores are nearer than `TIE`.
        score, probability: the largest differences.
        excess: the largest difference over what is allowed; above 1 the export is refused.
    """

    images: int = 0
    different: int = 0
    ties: int = 0
    score: float = 0.0
    probability: float = 0.0
    excess: float = 0.0

    @property
    def holds(self) -> bool:
        return self.images > 0 and self.different == 0 and self.excess <= 1

    def to_json(self) -> dict[str, Any]:
        return {
            "images_one_at_a_time": self.images,
            "labels_different": self.different,
            "ties": self.ties,
            "largest_score_difference": self.score,
            "largest_probability_difference": self.probability,
        }

    def __str__(self) -> str:
        labels = "same labels" if self.different == 0 else f"{self.different:,} labels differ"
        ties = f" but for {self.ties} tie(s)" if self.ties else ""
        return f"{labels}{ties}, scores within {self.score:.2g}, probabilities within {self.probability:.2g}"


def compare(
    classifier: OATClassifier,
    runners: dict[str, Runner],
    images: Iterable[np.ndarray],
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Agreement]:
    """Answer every image with the original and with each export, alone; then the first ones again in one batch.

    Args:
        images: prepared, uint8 (S, S, 3).
        advance: told how many are done.
    """
    found = {name: Agreement() for name in runners}
    sharper = 1.0 if classifier.temperature is None else max(1.0, 1 / classifier.temperature)
    first: list[np.ndarray] = []
    answers = []
    for image_SSC in images:
        image_1SSC = np.require(image_SSC[None], requirements=["C", "W"])
        answer = classifier.answer(image_1SSC)
        reference = answer.scores_BC.numpy(), answer.probabilities_BC.numpy(), answer.labels_B.numpy()
        for name, run in runners.items():
            _judge(found[name], reference, run(image_1SSC), sharper)
            found[name].images += 1
        if len(first) < _TOGETHER:
            first.append(image_SSC)
            answers.append(reference)
        advance(1)
    if len(first) > 1:
        together = tuple(np.concatenate(column) for column in zip(*answers, strict=True))
        for name, run in runners.items():
            _judge(found[name], together, run(np.stack(first)), sharper)
    return found


def _judge(
    agreement: Agreement, reference: tuple[np.ndarray, ...], answer: tuple[np.ndarray, ...], sharper: float
) -> None:
    scores_BC, probabilities_BC, labels_B = reference
    if any(ours.shape != theirs.shape for ours, theirs in zip(reference, answer, strict=True)):
        raise OatError("the exported model gives outputs of other shapes than the original; it is not written")
    scale_B = np.maximum(1.0, np.abs(scores_BC).max(axis=1))
    score_B = np.abs(answer[0] - scores_BC).max(axis=1)
    probability_B = np.abs(answer[1] - probabilities_BC).max(axis=1)
    rows = np.arange(len(labels_B))
    with np.errstate(invalid="ignore"):
        gap_B = scores_BC[rows, labels_B] - scores_BC[rows, answer[2]]
        other_B = answer[2] != labels_B
        tie_B = other_B & (gap_B < TIE * scale_B)
        excess = np.maximum(score_B / scale_B, probability_B / (scale_B * sharper)).max() / BOUND
    agreement.ties += int(tie_B.sum())
    agreement.different += int((other_B & ~tie_B).sum())
    agreement.score = _larger(agreement.score, score_B.max())
    agreement.probability = _larger(agreement.probability, probability_B.max())
    agreement.excess = _larger(agreement.excess, excess)


def _larger(before: float, now: float) -> float:
    """The larger one; what is not a number counts as infinite."""
    return max(before, float(now) if np.isfinite(now) else float("inf"))


def split_images(classifier: OATClassifier, shards: ShardSet, count: int) -> Iterator[np.ndarray]:
    """Up to `count` images of a split, drawn by a fixed seed and prepared; undecodable ones are passed over."""
    order = EpochOrder(shards.num_samples, 0, 0).ids(0, shards.num_samples)
    reader = ShardReader(shards)
    try:
        for number in order.tolist():
            if count == 0:
                return
            try:
                yield classifier.pipeline.whole(decode_rgb(reader.read(number)))
            except ImageError:
                continue
            count -= 1
    finally:
        reader.close()


def noise(size: int, count: int) -> Iterator[np.ndarray]:
    """`count` images (size, size, 3) of random pixels, by a fixed seed."""
    random = np.random.default_rng(0)
    for _ in range(count):
        yield random.integers(0, 256, (size, size, 3), dtype=np.uint8)
