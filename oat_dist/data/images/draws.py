"""Random numbers of augmentation: pure functions of (seed, epoch, sample id), so that neither rank, thread nor batch
matters, and a resumed run draws what the undisturbed one drew.

Every use has a stream of its own, the last key of the hash. All streams of data, here so that none is taken twice:

======= ==================================================
1, 2    order of an epoch (plan)
3       flips
10      random_resized_crop
11      pad_crop
12      randaugment
13      trivialaugment
20      mixup and cutmix (mixing)
21      which shards a stream draws (stream)
101 102 order of and within windows of shards (windows)
======= ==================================================
"""

from __future__ import annotations

import numpy as np

from oat_dist.data.hashing import GOLDEN, keyed_hash

__all__ = ["FLIP", "MIXING", "PAD_CROP", "RANDAUGMENT", "RANDOM_RESIZED_CROP", "STREAM", "TRIVIALAUGMENT", "uniforms"]

FLIP = 3
RANDOM_RESIZED_CROP = 10
PAD_CROP = 11
RANDAUGMENT = 12
TRIVIALAUGMENT = 13
MIXING = 20
STREAM = 21


def uniforms(ids_B: np.ndarray, seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """(B, count) independent float64 in 0 <= u < 1, the same for a sample whatever else is in the batch."""
    start_B1 = keyed_hash(ids_B, seed, epoch, stream)[:, None]
    words_BK = keyed_hash(start_B1 + np.arange(count, dtype=np.uint64) * GOLDEN)
    return (words_BK >> np.uint64(11)) * 2.0**-53
