"""What is done to each image on its way from a file to a batch.

1. A box says which part of it is taken (`crop`), in training by hash of (seed, epoch, sample id).
2. It is decoded, as little of it as the box needs, and resized to (S, S, 3) uint8.
3. The whole batch is augmented in place: flip, pad_crop, then a policy.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oat_dist.data.images.batchwise import flip_images, pad_crop_images, pad_crop_offsets
from oat_dist.data.images.crops import aligned_boxes, center_boxes, random_resized_boxes
from oat_dist.data.images.decode import decode_crop, decode_rgb, jpeg_size, refuse_outside
from oat_dist.data.images.policies import randaugment, trivialaugment
from oat_dist.data.images.resize import put, resize_crop, squash
from oat_dist.data.images.transforms import AUGMENTATIONS, flips
from oat_dist.errors import ConfigError

__all__ = ["EVAL_CROPS", "TRAIN_CROPS", "ImagePipeline", "parse_augment"]

TRAIN_CROPS = ("squash", "random_resized_crop", "center_crop")
EVAL_CROPS = ("squash", "center_crop")
_POLICIES = {"randaugment": randaugment, "trivialaugment": trivialaugment}
_PADDING = 8  # pad_crop pads by size / 8: 4 pixels of 32


def parse_augment(text: str) -> tuple[str, ...]:
    """Read ``data.augment``: "none", or names of `AUGMENTATIONS` by spaces or commas; in their order of use.

    Raises:
        ConfigError: an unknown name (the nearest one is named), or names that exclude each other.
    """
    words = text.replace(",", " ").split()
    if words == ["none"]:
        return ()
    if not words:
        raise ConfigError(f"data.augment is empty; use none, or any of {', '.join(AUGMENTATIONS)}")
    if "none" in words:
        raise ConfigError(f"data.augment={text!r}: none stands alone; take it out, or the others")
    for word in words:
        _known("data.augment", word, AUGMENTATIONS, "none, or any of ")
        if words.count(word) > 1:
            raise ConfigError(f"data.augment={text!r} names {word} twice; once is enough")
    if all(policy in words for policy in _POLICIES):
        raise ConfigError(f"data.augment={text!r}: choose one of {' and '.join(_POLICIES)}, not both")
    return tuple(name for name in AUGMENTATIONS if name in words)


@dataclass(frozen=True)
class ImagePipeline:
    """From files to batches. Used from several threads; the same sample gives the same pixels whatever is around it.

    Args:
        size: S; images come out (S, S, 3).
        crop: "squash": the whole image, whatever its shape; "random_resized_crop": torchvision's, for training;
            "center_crop": the square in the middle.
        augment: as `parse_augment` gives it.
        seed: of crops and augmentation.
        crop_scale: random_resized_crop: share of the image's area, from and to.
        crop_ratio: random_resized_crop: width over height, from and to.
        crop_fraction: center_crop: side of the square over the short side of the image.

    Raises:
        ConfigError: a value that cannot be.
    """

    size: int
    crop: str = "squash"
    augment: tuple[str, ...] = ()
    seed: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"data.image_size must be at least 1, not {self.size}")
        _known("data.crop", self.crop, TRAIN_CROPS)
        if self.augment and parse_augment(" ".join(self.augment)) != self.augment:
            raise ConfigError(f"augment={self.augment} is not in the order of use; pass it through parse_augment")
        if "pad_crop" in self.augment and self.size < _PADDING:
            raise ConfigError(
                f"data.augment=pad_crop shifts by up to data.image_size / {_PADDING} pixels, none at {self.size}; "
                "take it out, or use larger images"
            )
        for name, (low, high), most in (("scale", self.crop_scale, 1.0), ("ratio", self.crop_ratio, float("inf"))):
            if not 0 < low <= high <= most or high == float("inf"):
                limit = "" if most == float("inf") else f" <= {most:g}"
                raise ConfigError(f"data.crop_{name} must be two numbers 0 < from <= to{limit}, not {low:g}, {high:g}")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"data.crop_fraction must be above 0 and at most 1, not {self.crop_fraction}")

    @property
    def deterministic(self) -> bool:
        """Whether `read` gives the same pixels in every epoch, so that they can be kept."""
        return self.crop != "random_resized_crop"

    @property
    def recipe(self) -> str:
        """Names what `read` does, where it is the same in every epoch; else "full": only decoded images are."""
        fraction = f"-{self.crop_fraction!r}" if self.crop == "center_crop" else ""
        return f"{self.crop}-{self.size}{fraction}" if self.deterministic else "full"

    def boxes(self, ids_B: np.ndarray, widths_B: np.ndarray, heights_B: np.ndarray, epoch: int) -> np.ndarray | None:
        """What is cut out of each image: (B, 4) int64 of (top, left, height, width); None: all of it, squashed.

        Raises:
            DataError: an image of no pixels.
        """
        if self.crop == "squash":
            return None
        if self.crop == "center_crop":
            return center_boxes(widths_B, heights_B, self.crop_fraction)
        boxes_B4 = random_resized_boxes(ids_B, widths_B, heights_B, self.seed, epoch, self.crop_scale, self.crop_ratio)
        return aligned_boxes(boxes_B4, self.size)

    def read(
        self, data: bytes, box: Sequence[int] | np.ndarray | None, out_SSC: np.ndarray | None = None
    ) -> np.ndarray:
        """Decode one image and cut `box` out of it, to (S, S, 3) uint8.

        A random crop is decoded at the lowest scale that serves; anything else in full, and resized exactly.

        Args:
            out_SSC: contiguous, such as a slot of a batch; the result is put there, which saves a copy.

        Raises:
            ImageError: cannot be decoded, or `box` does not lie inside the image.
        """
        if box is not None and not self.deterministic:
            return decode_crop(data, box, self.size, out_SSC)
        image_HWC = decode_rgb(data, out_SSC if box is None else None)
        if image_HWC is out_SSC:
            return out_SSC
        return self.from_decoded(image_HWC, box, out_SSC)

    def from_decoded(
        self, image_HWC: np.ndarray, box: Sequence[int] | np.ndarray | None, out_SSC: np.ndarray | None = None
    ) -> np.ndarray:
        """`read` from an image that is decoded already. The result may be `image_HWC` itself if it needs no change.

        Raises:
            ImageError: `box` does not lie inside the image.
        """
        if box is None:
            return put(squash(image_HWC, self.size), out_SSC)
        top, left, height, width = box = [int(edge) for edge in box]
        refuse_outside(box, *image_HWC.shape[:2])
        if not self.deterministic:
            return resize_crop(image_HWC, box, self.size, out_SSC)
        return put(squash(image_HWC[top : top + height, left : left + width], self.size), out_SSC)

    def whole(self, image_HWC: np.ndarray, sample_id: int = 0, epoch: int = 0) -> np.ndarray:
        """An image of which only the pixels are there, to (S, S, 3): `boxes` and `from_decoded` in one."""
        height, width = image_HWC.shape[:2]
        return self.from_decoded(image_HWC, self._box(sample_id, width, height, epoch))

    def read_whole(self, data: bytes, sample_id: int, epoch: int) -> np.ndarray:
        """An image whose size no index knows, to (S, S, 3): `boxes` and `read` in one.

        Raises:
            ImageError: cannot be decoded.
        """
        size = None if self.deterministic else jpeg_size(data)
        if size is None:
            return self.whole(decode_rgb(data), sample_id, epoch)
        return self.read(data, self._box(sample_id, *size, epoch))

    def _box(self, sample_id: int, width: int, height: int, epoch: int) -> np.ndarray | None:
        boxes_14 = self.boxes(np.array([sample_id]), np.array([width]), np.array([height]), epoch)
        return None if boxes_14 is None else boxes_14[0]

    def finish(self, images_BHWC: np.ndarray, ids_B: np.ndarray, epoch: int) -> None:
        """Augment a batch (B, S, S, 3) uint8 in place."""
        if "flip" in self.augment:
            flip_images(images_BHWC, flips(ids_B, self.seed, epoch))
        if "pad_crop" in self.augment:
            padding = self.size // _PADDING
            pad_crop_images(images_BHWC, pad_crop_offsets(ids_B, self.seed, epoch, padding), padding)
        for name, policy in _POLICIES.items():
            if name in self.augment:
                policy(images_BHWC, ids_B, self.seed, epoch)


def _known(key: str, word: str, choices: Sequence[str], before: str = "one of ") -> None:
    if word not in choices:
        close = difflib.get_close_matches(word, choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key} must be {before}{', '.join(choices)}, not {word!r}{hint}")
