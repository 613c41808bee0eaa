"""scikit-learn's handwritten digits: 1,797 real 8x8 scans that lie in its wheel, so nothing is downloaded."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
from PIL import Image

from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.splits import PackPlan, SplitRequest, deal_to_splits
from oat_dist.errors import DataError

__all__ = ["HELP", "plan_digits"]

HELP = """\
scikit-learn's 1,797 handwritten digits (8x8); INPUT is -, nothing is downloaded
(needs: pip install 'oat_dist[quickstart]')"""

_DEFAULT_SPLITS = {"train": Fraction(4, 5), "test": Fraction(1, 5)}


def plan_digits(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """The digits as 8x8 grey PNGs named `<class>/<number>.png`; by default 80 % train, 20 % test.

    Raises:
        DataError: `input` is not "-", or scikit-learn is not installed.
    """
    if input != "-":
        raise DataError(f"digits come with scikit-learn and read no input; write - in place of {input!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "the digits need scikit-learn, which is not installed; run: pip install 'oat_dist[quickstart]'"
        ) from None
    digits = load_digits()
    samples = [
        Sample(f"{label}/{number:04d}.png", str(label), _png(image))
        for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True))
    ]
    classes = [str(k) for k in range(10)]
    return PackPlan("digits", classes, deal_to_splits(samples, splits or _DEFAULT_SPLITS, seed))


def _png(image: np.ndarray) -> bytes:
    """PNG of an (8, 8) image of whole values 0..16, scaled to 0..255."""
    pixels = (image.astype(np.int64) * 255 + 8) // 16
    file = io.BytesIO()
    # level 0: stored, not compressed, so the bytes do not depend on the version of zlib
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()
