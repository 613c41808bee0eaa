"""Resizing, batch-wise augmentation and normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize
from torchvision.transforms.v2 import functional as reference

from oat_dist.data.images.batchwise import flip_images, pad_crop_images, pad_crop_offsets
from oat_dist.data.images.draws import FLIP, PAD_CROP, RANDAUGMENT, RANDOM_RESIZED_CROP, TRIVIALAUGMENT, uniforms
from oat_dist.data.images.opencv import cv2
from oat_dist.data.images.transforms import Normalise, flips, squash


@pytest.mark.parametrize(("height", "width"), [(20, 30), (300, 200), (64, 64), (1, 500), (63, 65)])
def test_squash_is_torchvisions_resize(height: int, width: int) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Resize((64, 64))(Image.fromarray(picture)))
    squashed = squash(picture, 64)
    assert squashed.shape == (64, 64, 3) and np.array_equal(squashed, expected)
    assert np.array_equal(squash(picture[:, ::-1], 64), np.asarray(Resize((64, 64))(Image.fromarray(picture[:, ::-1]))))


def test_normalise_is_the_plain_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images_BHWC = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8))
    before = images_BHWC.clone()
    out_BCHW = Normalise(mean, std, torch.device("cpu"))(images_BHWC)
    wide_BHWC = images_BHWC.double()
    expected_BHWC = (wide_BHWC / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    assert out_BCHW.shape == (5, 3, 7, 9) and out_BCHW.dtype == torch.float32 and out_BCHW.is_contiguous()
    assert torch.allclose(out_BCHW.double(), expected_BHWC.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert torch.equal(images_BHWC, before)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_flips_are_a_fair_coin_of_seed_epoch_and_id(seed: int) -> None:
    ids = np.arange(10_000)
    flipped = flips(ids, seed, 4)
    assert flipped.dtype == bool and abs(flipped.mean() - 0.5) < 0.02  # four standard deviations
    assert np.array_equal(flips(ids[::-1], seed, 4)[::-1], flipped)  # of the id, not of the slot
    for other in (flips(ids, seed, 5), flips(ids, seed + 1, 4)):
        assert abs((other != flipped).mean() - 0.5) < 0.02  # and independent of other epochs and seeds


def test_flips_are_those_of_runs_before_this_version() -> None:
    """Resuming one needs the same."""
    assert np.packbits(flips(np.arange(64), 7, 3)).tobytes().hex() == "9fb5ba3d84060d28"
    assert np.packbits(flips(np.arange(64) * 10**12, 2**62 + 1, 0)).tobytes().hex() == "e7d10e013b14b138"


def test_uniform_numbers_are_uniform_and_of_nothing_but_seed_epoch_id_and_use() -> None:
    ids = np.arange(4000)
    draws = uniforms(ids, 5, 2, 99, 6)
    assert draws.shape == (4000, 6) and draws.dtype == np.float64 and draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in draws.T])
    assert (((counts - 200) ** 2 / 200).sum(axis=1) < 44).all()  # chi-squared of 19 degrees, at 0.001
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.07
    assert np.array_equal(uniforms(ids[::-7], 5, 2, 99, 6), draws[::-7])
    assert np.array_equal(uniforms(ids, 5, 2, 99, 3), draws[:, :3])
    for other in (uniforms(ids, 6, 2, 99, 6), uniforms(ids, 5, 3, 99, 6), uniforms(ids, 5, 2, 98, 6)):
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.03
    streams = [1, 2, FLIP, RANDOM_RESIZED_CROP, PAD_CROP, RANDAUGMENT, TRIVIALAUGMENT, 20, 101, 102]
    assert len(set(streams)) == len(streams)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (300, 32, 32, 3), (5, 31, 33, 3), (4, 224, 224, 3), (7, 300, 301, 3)])
def test_flips_in_place(shape: tuple[int, ...]) -> None:
    """In one call or image by image, over several rounds, in memory of torch."""
    images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images_BHWC.numpy().copy()
    flipped_B = np.arange(shape[0]) % 3 != 1
    flip_images(images_BHWC.numpy(), flipped_B)
    before[flipped_B] = before[flipped_B][:, :, ::-1]
    assert np.array_equal(images_BHWC.numpy(), before)
    flip_images(images_BHWC.numpy(), np.zeros(shape[0], dtype=bool))
    assert np.array_equal(images_BHWC.numpy(), before)


@pytest.mark.parametrize(("number", "size"), [(300, 32), (1, 8), (3, 301)])
def test_pad_and_crop_in_place(number: int, size: int) -> None:
    padding = size // 8
    images_BHWC = np.random.default_rng(0).integers(1, 256, (number, size, size, 3), dtype=np.uint8)
    offsets_B2 = pad_crop_offsets(np.arange(number), 3, 1, padding)
    assert offsets_B2.min() >= 0 and offsets_B2.max() <= 2 * padding
    before_BCHW = torch.from_numpy(images_BHWC.copy()).permute(0, 3, 1, 2)
    pad_crop_images(images_BHWC, offsets_B2, padding)
    for image_HWC, before_CHW, (down, across) in zip(images_BHWC, before_BCHW, offsets_B2.tolist(), strict=True):
        padded_CHW = reference.pad(before_CHW, [padding] * 4)
        expected_CHW = reference.crop(padded_CHW, down, across, size, size)
        assert np.array_equal(image_HWC, expected_CHW.permute(1, 2, 0).numpy())


def test_every_offset_of_pad_and_crop_is_as_likely() -> None:
    offsets_B2 = pad_crop_offsets(np.arange(8100), 3, 1, 4)
    counts = np.histogram2d(*offsets_B2.T, bins=9, range=[[-0.5, 8.5]] * 2)[0]
    assert ((counts - 100) ** 2 / 100).sum() < 125  # chi-squared of 80 degrees, at 0.001
    assert np.array_equal(pad_crop_offsets(np.array([17, 5]), 3, 1, 4), offsets_B2[[17, 5]])


def test_opencv_starts_no_threads() -> None:
    assert cv2.getNumThreads() == 1
