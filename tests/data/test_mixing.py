"""Mixup and CutMix: fixed pairs, one draw for a global batch, the very mixture on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oat_dist.batch import Mix
from oat_dist.data.mixing import Mixing, blend

EVERYONE = np.ones(8, dtype=bool)


def test_partners_are_fixed_pairs_and_a_last_odd_sample_stays_alone() -> None:
    mixing = Mixing("mixup", 1.0, seed=0)
    assert mixing.of(0, 0, 32, EVERYONE).partner_B.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert mixing.of(0, 0, 32, EVERYONE[:5]).partner_B.tolist() == [1, 0, 3, 2, 4]
    assert mixing.of(0, 0, 32, EVERYONE[:1]).partner_B.tolist() == [0]


def test_a_pair_with_a_masked_sample_stays_as_it_is() -> None:
    valid_B = EVERYONE.copy()
    valid_B[[2, 7]] = False
    assert Mixing("mixup", 1.0, seed=0).of(0, 0, 32, valid_B).partner_B.tolist() == [1, 0, 2, 3, 5, 4, 6, 7]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_draw_belongs_to_the_global_batch(kind: str) -> None:
    mixing = Mixing(kind, 1.0, seed=0)
    whole, part = mixing.of(2, 5, 32, EVERYONE), mixing.of(2, 5, 32, EVERYONE[:3])
    assert (whole.share, whole.box) == (part.share, part.box)
    others = [mixing.of(2, 6, 32, EVERYONE), mixing.of(1, 5, 32, EVERYONE), Mixing(kind, 1.0, 1).of(2, 5, 32, EVERYONE)]
    assert all((other.share, other.box) != (whole.share, whole.box) for other in others)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 4.0])
def test_the_share_is_drawn_from_beta(alpha: float) -> None:
    """Against numpy's own Beta by the largest distance of the two distribution functions (Kolmogorov-Smirnov)."""
    mixing, count = Mixing("mixup", alpha, seed=3), 800
    ours = np.sort([mixing.of(0, step, 32, EVERYONE).share for step in range(count)])
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))

    def distance(sample: np.ndarray) -> float:
        return float(np.abs(np.searchsorted(theirs, sample) / len(theirs) - np.arange(count) / count).max())

    assert distance(ours) < 1.63 / count**0.5  # the 1 % level
    assert distance(np.sort(ours**2)) > 1.63 / count**0.5  # the control: the test can fail


def test_the_share_of_cutmix_is_the_area_that_stays() -> None:
    mixing = Mixing("cutmix", 1.0, seed=0)
    shares = []
    for step in range(200):
        mix = mixing.of(0, step, 20, EVERYONE)
        assert mix.box is not None
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 20 and 0 <= left <= right <= 20
        assert mix.share == 1 - (bottom - top) * (right - left) / 400
        shares.append(mix.share)
    assert min(shares) < 0.3 and max(shares) > 0.9


def test_blending() -> None:
    images_BCHW = torch.arange(3 * 1 * 4 * 4, dtype=torch.float32).view(3, 1, 4, 4)
    partner_B = torch.tensor([1, 0, 2])
    averaged = blend(images_BCHW, Mix(partner_B, 0.75))
    torch.testing.assert_close(averaged[0], 0.75 * images_BCHW[0] + 0.25 * images_BCHW[1])
    torch.testing.assert_close(averaged[1], 0.75 * images_BCHW[1] + 0.25 * images_BCHW[0])
    assert torch.equal(averaged[2], images_BCHW[2])
    cut = blend(images_BCHW, Mix(partner_B, 0.875, (1, 3, 0, 1)))
    expected = images_BCHW.clone()
    expected[0, :, 1:3, 0:1], expected[1, :, 1:3, 0:1] = images_BCHW[1, :, 1:3, 0:1], images_BCHW[0, :, 1:3, 0:1]
    assert torch.equal(cut, expected)
