"""decode_crop and resize_crop: the right place to a fraction of a pixel, no aliasing, and the fallbacks."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oat_dist.data.images.crops import aligned_boxes, random_resized_boxes
from oat_dist.data.images.decode import ImageError, decode_crop, decode_rgb
from oat_dist.data.images.opencv import cv2
from oat_dist.data.images.resize import reduction, resize_crop, squash

modest = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    defaults = {"quality": 97, "subsampling": 0} if kind == "JPEG" else {}
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **{**defaults, **options})
    return file.getvalue()


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Detail at every scale, about as much at each, as photos have."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        coarse = random.normal(size=(cells, cells, 3))
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 24 * total, 0, 255).astype(np.uint8)


def exact(image: np.ndarray, box: list[int], size: int) -> np.ndarray:
    """What torchvision does: crop, then Pillow's antialiased bilinear resizing."""
    top, left, height, width = box
    return squash(image[top : top + height, left : left + width], size)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_crop_of_the_size_asked_for_is_the_decoders_pixels() -> None:
    data = encode(textured(100, 150), subsampling=2)
    whole = simplejpeg.decode_jpeg(data, colorspace="RGB")
    assert np.array_equal(decode_crop(data, [30, 40, 64, 64], 64), whole[30:94, 40:104])
    assert np.array_equal(resize_crop(whole, [30, 40, 64, 64], 64), whole[30:94, 40:104])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_crop_of_twice_the_size_is_that_of_libjpegs_scaled_image(factor: int) -> None:
    data = encode(textured(301, 403), subsampling=2)
    scaled = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=-(-301 // factor), min_width=-(-403 // factor))
    assert scaled.shape == (-(-301 // factor), -(-403 // factor), 3)
    box = [factor * 3, factor * 5, factor * 32, factor * 32]
    assert np.array_equal(decode_crop(data, box, 32), scaled[3:35, 5:37])


def test_a_jpeg_smaller_than_a_block_is_not_scaled() -> None:
    """Of 5 pixels, 2/8 and 3/8 are both 2, and libjpeg-turbo would take the other one."""
    levels = np.linspace(0, 240, 5).astype(np.uint8)
    picture = np.broadcast_to(levels[None, :, None], (5, 5, 3)).copy()
    assert distance(decode_crop(encode(picture), [0, 0, 4, 4], 1), np.full((1, 1, 3), 90, dtype=np.uint8)) < 4


PERIOD = 70


def wave(across: bool) -> np.ndarray:
    """A sine over pixel centres, grey: its phase shows a shift of a fraction of a pixel, whatever the smoothing."""
    line = np.rint(128 + 100 * np.sin(2 * np.pi * np.arange(512) / PERIOD)).astype(np.uint8)
    image = np.repeat(line[None], 512, axis=0)
    return np.repeat((image if across else image.T)[:, :, None], 3, axis=2)


def shift_of(levels: np.ndarray, places: np.ndarray) -> float:
    """By how many pixels a wave found at `places` is off."""
    angle = 2 * np.pi * places / PERIOD
    basis = np.stack([np.sin(angle), np.cos(angle), np.ones_like(angle)], axis=1)
    sine, cosine, _ = np.linalg.lstsq(basis, levels, rcond=None)[0]
    return float(np.arctan2(cosine, sine) / (2 * np.pi) * PERIOD)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(
    ("size", "factor", "start", "length"),
    [
        (200, 1, 20, 200),
        (150, 1, 7, 100),  # enlarged
        (100, 1, 11, 170),  # smoothed
        (64, 2, 24, 200),  # on the grid of the reduced image, and off it in three ways
        (64, 2, 23, 200),
        (64, 2, 24, 199),
        (64, 2, 31, 191),
        (32, 4, 40, 200),
        (32, 4, 21, 203),
        (16, 8, 48, 192),
        (16, 8, 45, 187),
    ],
)
def test_a_crop_is_where_its_box_says_to_a_twentieth_of_a_pixel(
    across: bool, size: int, factor: int, start: int, length: int
) -> None:
    picture = wave(across)
    box = [60, start, 256, length] if across else [start, 60, length, 256]
    assert reduction(box[2], box[3], size) == factor
    places = start + (np.arange(size) + 0.5) * length / size - 0.5  # pixel centres, in pixels of the full image
    for data in (encode(picture), encode(picture, "PNG")):
        for crop in (decode_crop(data, box, size), resize_crop(decode_rgb(data), box, size)):
            inner = slice(2, -2)  # the edges of a crop have nothing beyond them
            levels = crop.astype(float).mean(axis=(0 if across else 1, 2))[inner]
            assert abs(shift_of(levels, places[inner])) < 0.05
            for half in (-0.5, 0.5):  # a box half a pixel off would have failed
                assert abs(shift_of(levels, places[inner] + half)) > 0.35


# Mean distance in levels of 255. On photos it is 0.6 at 224 pixels; antialiased bilinear and bicubic, both by Pillow,
# are 1 to 2 apart. This picture has more fine detail than photos.
BOUND = 4.0


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return textured(800, 800)


@pytest.fixture(scope="module")
def jpeg_and_png(picture: np.ndarray) -> tuple[bytes, bytes]:
    return encode(picture), encode(picture, "PNG", compress_level=1)


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.2, 1.31, 1.5, 1.9, 2.0, 2.5, 3.1, 4.0, 6.0, 9.0, 17.0])
def test_crops_are_antialiased(ratio: float, picture: np.ndarray, jpeg_and_png: tuple[bytes, bytes]) -> None:
    size = 32
    for stretch in (1.0, 1.4):
        shape = [round(size * ratio), round(size * ratio * stretch)]
        [box] = aligned_boxes(np.array([[17, 9, *shape]]), size).tolist()
        for data in jpeg_and_png:
            assert distance(decode_crop(data, box, size), exact(decode_rgb(data), box, size)) < BOUND
        top, left, height, width = box
        naive = cv2.resize(picture[top : top + height, left : left + width], (size, size))
        aliased = distance(naive, exact(picture, box, size))
        assert aliased > 2 * BOUND or ratio < 4  # plain linear interpolation would have failed
        if ratio in (1.5, 1.9, 2.5, 3.1):
            assert distance(resize_crop(picture, box, size), exact(picture, box, size)) < 0.5 * aliased


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.data())
@modest
def test_any_box_of_any_image(height: int, width: int, size: int, more: st.DataObject) -> None:
    picture = textured(height, width)
    down, across = more.draw(st.integers(1, height)), more.draw(st.integers(1, width))
    box = [more.draw(st.integers(0, height - down)), more.draw(st.integers(0, width - across)), down, across]
    for data in (encode(picture), encode(picture, "PNG")):
        crop = decode_crop(data, box, size)
        assert crop.shape == (size, size, 3) and distance(crop, exact(decode_rgb(data), box, size)) < 6
        slot = np.zeros((2, size, size, 3), dtype=np.uint8)
        assert decode_crop(data, np.array(box), size, slot[1]) is not None
        assert np.array_equal(slot[1], crop) and not slot[0].any()


@pytest.mark.parametrize("size", [32, 100])
def test_every_kind_of_file(size: int) -> None:
    picture = textured(200, 300)
    image = Image.fromarray(picture)
    grey = np.repeat(np.asarray(image.convert("L"))[:, :, None], 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: not applied
    box = [16, 24, 160, 240]
    for data, expected in (
        (encode(picture, progressive=True), picture),
        (encode(picture, exif=exif), picture),
        (encode(image.convert("CMYK"), subsampling=-1), picture),
        (encode(image.convert("L")), grey),
        (encode(grey[:, :, 0], "PNG"), grey),
        (encode(image.convert("RGBA"), "PNG"), picture),
        (encode(picture, "WEBP", lossless=True), picture),
        (encode(picture, "BMP"), picture),
    ):
        assert distance(decode_crop(data, box, size), exact(expected, box, size)) < BOUND


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 21, 30), (0, 0, 20, 31), (1, 0, 20, 30), (0, 9, 20, 22), (-1, 0, 20, 30), (0, 0, 0, 9), (0, 0, 9, -1)],
)
def test_a_box_outside_the_image_is_refused(kind: str, size: int, box: tuple[int, ...]) -> None:
    """An index that gives another size than the file has."""
    data = encode(textured(20, 30), kind)
    with pytest.raises(ImageError, match=r"the image has 30 x 20 pixels, and the crop of .* lies outside; the index"):
        decode_crop(data, box, size)


@pytest.mark.parametrize("size", [8, 100])
def test_damaged_files_are_refused(size: int) -> None:
    data = encode(textured(64, 64))
    assert decode_crop(data, [0, 0, 64, 64], size).shape == (size, size, 3)
    for keep in (0, 2, 100, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError) as caught:
            decode_crop(data[:keep], [0, 0, 64, 64], size)
        assert str(caught.value) and "\n" not in str(caught.value)


def test_decompression_bombs_are_refused_at_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(textured(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    for size in (8, 64):
        with pytest.raises(ImageError, match="more than 4,095 pixels"):
            decode_crop(data, [0, 0, 64, 64], size)


def test_threads_do_not_disturb_each_other() -> None:
    picture = textured(300, 300)
    files = [encode(picture), encode(picture, "PNG"), encode(picture, progressive=True)]
    jobs = [(files[i % 3], [i, 2 * i, 40 + 7 * i, 60 + 5 * i], 32) for i in range(24)] * 3
    expected = [decode_crop(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(np.array_equal, pool.map(lambda job: decode_crop(*job), jobs), expected))


def test_other_threads_go_on_while_one_decodes() -> None:
    """The interpreter's lock is let go of: switching is off, so that a call that held it would stop the counting."""
    data = encode(np.zeros((3000, 3000, 3), dtype=np.uint8))
    counted, interval = [0], sys.getswitchinterval()

    def decode(seen: list[int]) -> None:
        seen.append(counted[0])
        decode_crop(data, [0, 0, 3000, 3000], 700)
        seen.append(counted[0])

    def count() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=decode, args=(seen,))
        thread.start()
        while thread.is_alive():
            counted[0] += 1
            time.sleep(0)
        return seen[1] - seen[0]

    sys.setswitchinterval(100)
    try:
        assert any(count() > 20 for _ in range(20))  # one is enough: this machine may have other work
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip("set OAT_TEST_DATA to the folder that holds hymenoptera.tar")
    with tarfile.open(Path(folder) / "hymenoptera.tar") as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][::16]
        return [archive.extractfile(member).read() for member in members]


@pytest.mark.parametrize(("size", "most"), [(224, 0.8), (64, 2.0)])
def test_random_crops_of_real_photos(photos: list[bytes], size: int, most: float) -> None:
    found, naive = [], []
    for number, data in enumerate(photos):
        whole = decode_rgb(data)
        height, width = whole.shape[:2]
        boxes = random_resized_boxes(np.array([number]), np.array([width]), np.array([height]), 0, 0)
        [box] = aligned_boxes(boxes, size).tolist()
        expected = exact(whole, box, size)
        found.append(
            (distance(decode_crop(data, box, size), expected), distance(resize_crop(whole, box, size), expected))
        )
        top, left, down, across = box
        naive.append(distance(cv2.resize(whole[top : top + down, left : left + across], (size, size)), expected))
    assert np.mean(found, axis=0).max() < most < np.mean(naive)
    assert np.max(found) < 6
