"""Boxes: torchvision's distribution, by hash; always inside the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from oat_dist.data.images.crops import aligned_boxes, center_boxes, random_resized_boxes
from oat_dist.data.images.resize import reduction
from oat_dist.errors import DataError

modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes_of(
    width: int, height: int, number: int, scale: tuple = SCALE, ratio: tuple = RATIO, seed: int = 0
) -> np.ndarray:
    sizes = np.full(number, width, dtype=np.uint32), np.full(number, height, dtype=np.uint32)
    return random_resized_boxes(np.arange(number), *sizes, seed, 0, scale, ratio)


def inside(boxes_B4: np.ndarray, width: int, height: int) -> bool:
    top, left, down, across = boxes_B4.T
    return bool(min(top.min(), left.min()) >= 0 and min(down.min(), across.min()) >= 1) and bool(
        (top + down).max() <= height and (left + across).max() <= width
    )


@pytest.mark.parametrize(("width", "height"), [(500, 333), (240, 1000)])
def test_the_distribution_is_torchvisions(width: int, height: int) -> None:
    """Area, shape and place of 3,000 boxes each, by the Kolmogorov-Smirnov distance; other settings are told apart."""
    number = 3000
    image_CHW = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image_CHW, list(SCALE), list(RATIO)) for _ in range(number)])
    ours = boxes_of(width, height, number)
    assert ours.dtype == np.int64 and ours.shape == (number, 4) and inside(ours, width, height)

    def facts(boxes_B4: np.ndarray) -> list[np.ndarray]:
        top, left, down, across = boxes_B4.astype(float).T
        return [down * across, across / down, top / np.maximum(height - down, 1), left / np.maximum(width - across, 1)]

    def distances(others: np.ndarray) -> list[float]:
        found = []
        for a, b in zip(facts(others), facts(theirs), strict=True):
            places = np.sort(np.concatenate([a, b]))
            below = [np.searchsorted(np.sort(values), places, side="right") / number for values in (a, b)]
            found.append(float(np.abs(below[0] - below[1]).max()))
        return found

    limit = 1.95 * (2 / number) ** 0.5  # one in a thousand
    assert max(distances(ours)) < limit
    assert distances(boxes_of(width, height, number, scale=(0.12, 1.0)))[0] > limit
    assert distances(boxes_of(width, height, number, ratio=(0.8, 4 / 3)))[1] > limit


def test_every_place_is_as_likely_the_last_one_too() -> None:
    boxes_B4 = boxes_of(8, 8, 4000, (0.39, 0.39), (1.0, 1.0))
    assert np.all(boxes_B4[:, 2:] == 5)
    counts = np.histogram2d(boxes_B4[:, 0], boxes_B4[:, 1], bins=4, range=[[-0.5, 3.5]] * 2)[0]
    assert ((counts - 250) ** 2 / 250).sum() < 38  # chi-squared of 15 degrees, at 0.001


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.001, 1), st.floats(0.05, 1), st.floats(1, 20))
@modest
def test_boxes_lie_inside_with_the_shape_and_share_asked_for(
    width: int, height: int, least: float, low: float, high: float
) -> None:
    boxes_B4 = boxes_of(width, height, 50, (least, 1.0), (low, high))
    assert inside(boxes_B4, width, height)
    down, across = boxes_B4[:, 2], boxes_B4[:, 3]
    # within rounding to whole pixels, which bounds both ways hold for
    assert np.all((across + 0.5) / (down - 0.5) >= low * 0.999) and np.all(
        (across - 0.5) / (down + 0.5) <= high * 1.001
    )
    fits = low <= width / height <= high
    assert np.all((across + 0.5) * (down + 0.5) >= (least if fits else 0) * width * height * 0.999)


@pytest.mark.parametrize(("width", "height"), [(2000, 10), (10, 2000), (9, 1), (1, 9), (1, 1)])
def test_where_no_try_fits_the_middle_is_taken_as_torchvision_does(width: int, height: int) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.99, 1.0], list(RATIO))
    assert np.array_equal(boxes_of(width, height, 20, (0.99, 1.0)), np.tile(expected, (20, 1)))


def test_a_box_is_of_seed_epoch_id_and_size_only() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 2**60, 500)
    widths, heights = random.integers(20, 900, 500), random.integers(20, 900, 500)
    boxes_B4 = random_resized_boxes(ids, widths, heights, 7, 3)
    for some in (np.arange(500)[::-1], np.array([499]), random.permutation(500)[:37]):
        assert np.array_equal(random_resized_boxes(ids[some], widths[some], heights[some], 7, 3), boxes_B4[some])
    for other in (
        random_resized_boxes(ids, widths, heights, 8, 3),
        random_resized_boxes(ids, widths, heights, 7, 4),
        random_resized_boxes(ids + 1, widths, heights, 7, 3),
    ):
        assert (other != boxes_B4).any(axis=1).mean() > 0.9  # of long, thin images it is always the middle
    assert random_resized_boxes(ids[:0], widths[:0], heights[:0], 7, 3).shape == (0, 4)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_an_index_without_sizes_is_refused(sizes: tuple[int, int]) -> None:
    widths, heights = np.array([9, sizes[0]], dtype=np.uint32), np.array([9, sizes[1]], dtype=np.uint32)
    message = (
        f"the index gives an image of {sizes[0]} x {sizes[1]} pixels.*make the index again, or use data.crop=squash"
    )
    with pytest.raises(DataError, match=message):
        random_resized_boxes(np.arange(2), widths, heights, 0, 0)
    with pytest.raises(DataError, match=message):
        center_boxes(widths, heights, 0.875)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1))
@modest
def test_the_middle_square(width: int, height: int, fraction: float) -> None:
    [box] = center_boxes(np.array([width], dtype=np.uint32), np.array([height], dtype=np.uint32), fraction).tolist()
    top, left, down, across = box
    assert down == across == max(round(min(width, height) * fraction), 1)
    assert 0 <= (height - down) - 2 * top <= 1 and 0 <= (width - across) - 2 * left <= 1


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 9), st.integers(0, 9))
@modest
def test_aligned_boxes_shrink_by_less_than_a_reduced_pixel(
    size: int, down: int, across: int, top: int, left: int
) -> None:
    box = np.array([top, left, down, across])
    aligned = aligned_boxes(box[None], size)[0]
    factor = reduction(down, across, size)
    assert factor == reduction(*aligned[2:].tolist(), size) and min(aligned[2:]) >= min(size * factor, down, across)
    assert not np.any(aligned % factor) and np.all((box - aligned >= 0) & (box - aligned < factor))
