"""RandAugment and TrivialAugmentWide: torchvision's operations and magnitudes to the pixel, chosen by our hash."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

from oat_dist.data.images.draws import RANDAUGMENT, TRIVIALAUGMENT, uniforms
from oat_dist.data.images.policies import BINS, OPERATIONS, apply_operation, magnitudes, randaugment, trivialaugment

THEIRS = {False: RandAugment(), True: TrivialAugmentWide()}


def photo(size: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def by_torchvision(wide: bool, image: Image.Image, operation: str, magnitude: float) -> np.ndarray:
    theirs = THEIRS[wide]
    return np.asarray(
        theirs._apply_image_or_video_transform(image, operation, magnitude, InterpolationMode.NEAREST, theirs._fill)
    )


@pytest.mark.parametrize("wide", [False, True])
def test_the_space_is_torchvisions(wide: bool) -> None:
    space = THEIRS[wide]._AUGMENTATION_SPACE
    assert tuple(space) == OPERATIONS
    assert THEIRS[False].num_ops == 2 and THEIRS[False].magnitude == 9 and THEIRS[wide].num_magnitude_bins == BINS
    for operation, (levels, signed) in space.items():
        for size in (32, 224):
            theirs, ours = levels(BINS, size, size), magnitudes(operation, size, wide=wide)
            assert ours == (None if theirs is None else tuple(map(float, theirs))), operation
        assert not signed or ours is not None


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_torchvisions_to_the_pixel(operation: str, wide: bool) -> None:
    signed = THEIRS[wide]._AUGMENTATION_SPACE[operation][1]
    for size in (32, 57):
        image = photo(size)
        for magnitude in magnitudes(operation, size, wide=wide) or (0.0,):
            for value in (magnitude, -magnitude) if signed else (magnitude,):
                ours = np.asarray(apply_operation(image, operation, value))
                assert np.array_equal(ours, by_torchvision(wide, image, operation, value)), value


def test_every_operation_but_identity_changes_an_image() -> None:
    image = photo(32)
    for operation in OPERATIONS:
        levels = magnitudes(operation, 32, wide=False)
        changed = not np.array_equal(apply_operation(image, operation, levels[20] if levels else 0.0), image)
        assert changed == (operation != "Identity"), operation


def batch(number: int, size: int = 24) -> np.ndarray:
    return np.stack([np.asarray(photo(size, seed)) for seed in range(number)])


def test_randaugment_applies_what_it_draws() -> None:
    images_BHWC, ids_B = batch(60), np.arange(60) * 31
    before_BHWC = images_BHWC.copy()
    randaugment(images_BHWC, ids_B, 5, 2)
    for image, before, draws in zip(images_BHWC, before_BHWC, uniforms(ids_B, 5, 2, RANDAUGMENT, 4), strict=True):
        expected = Image.fromarray(before)
        for choice, sign in draws.reshape(2, 2):
            name = OPERATIONS[int(choice * 14)]
            levels, signed = RandAugment._AUGMENTATION_SPACE[name]
            magnitude = 0.0 if levels(31, 24, 24) is None else float(levels(31, 24, 24)[9])
            value = -magnitude if signed and sign <= 0.5 else magnitude
            expected = Image.fromarray(by_torchvision(False, expected, name, value))
        assert np.array_equal(image, expected)


def test_trivialaugment_applies_what_it_draws() -> None:
    images_BHWC, ids_B = batch(60), np.arange(60) * 31
    before_BHWC = images_BHWC.copy()
    trivialaugment(images_BHWC, ids_B, 5, 2)
    for image, before, draws in zip(images_BHWC, before_BHWC, uniforms(ids_B, 5, 2, TRIVIALAUGMENT, 3), strict=True):
        name = OPERATIONS[int(draws[0] * 14)]
        levels, signed = TrivialAugmentWide._AUGMENTATION_SPACE[name]
        magnitude = 0.0 if levels(31, 24, 24) is None else float(levels(31, 24, 24)[int(draws[1] * 31)])
        value = -magnitude if signed and draws[2] <= 0.5 else magnitude
        assert np.array_equal(image, by_torchvision(True, Image.fromarray(before), name, value))


@pytest.mark.parametrize("policy", [randaugment, trivialaugment])
def test_of_seed_epoch_and_id_only_in_any_thread(policy: object) -> None:
    images_BHWC, ids_B = batch(1).repeat(40, axis=0), np.arange(40)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def run(some: np.ndarray, seed: int = 1, epoch: int = 1) -> np.ndarray:
        part = images_BHWC[some].copy()
        policy(part, ids_B[some], seed, epoch)
        return part

    whole = run(ids_B)
    assert len({image.tobytes() for image in whole}) > 20
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(run, [ids_B[::-1][i::7] for i in range(7)]))
    for i, part in enumerate(parts):
        assert np.array_equal(part, whole[::-1][i::7])
    for other in (run(ids_B, seed=2), run(ids_B, epoch=2)):
        assert np.mean([not np.array_equal(a, b) for a, b in zip(other, whole, strict=True)]) > 0.7
    # no generator that everybody shares has moved
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_every_choice_is_as_likely() -> None:
    draws = uniforms(np.arange(7000), 0, 0, TRIVIALAUGMENT, 3)
    counts = np.bincount((draws[:, 0] * len(OPERATIONS)).astype(int), minlength=14)
    assert ((counts - 500) ** 2 / 500).sum() < 35  # chi-squared of 13 degrees, at 0.001
    levels = np.bincount((draws[:, 1] * BINS).astype(int), minlength=BINS)
    assert ((levels - 7000 / 31) ** 2 / (7000 / 31)).sum() < 60  # of 30 degrees
