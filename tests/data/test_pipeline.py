"""The pipeline of one image and of one batch, and the words of the configuration for it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from oat_dist.data.images.batchwise import pad_crop_images, pad_crop_offsets
from oat_dist.data.images.crops import aligned_boxes, random_resized_boxes
from oat_dist.data.images.decode import ImageError, decode_crop, decode_rgb
from oat_dist.data.images.pipeline import EVAL_CROPS, TRAIN_CROPS, ImagePipeline, parse_augment
from oat_dist.data.images.policies import randaugment
from oat_dist.data.images.resize import resize_crop
from oat_dist.data.images.transforms import AUGMENTATIONS, flips, squash
from oat_dist.errors import ConfigError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


SIZES = [(90, 120), (200, 60), (64, 64), (40, 33), (32, 32)]
FILES = [encode(picture(*size, seed), kind) for seed, size in enumerate(SIZES) for kind in ("JPEG", "PNG")]
HEIGHTS, WIDTHS = (np.array([size[axis] for size in SIZES for _ in range(2)]) for axis in (0, 1))
IDS = np.arange(len(FILES)) * 1000


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", ()),
        ("flip", ("flip",)),
        ("  flip   randaugment ", ("flip", "randaugment")),
        ("pad_crop,flip", ("flip", "pad_crop")),
        ("trivialaugment, pad_crop", ("pad_crop", "trivialaugment")),
    ],
)
def test_augment_is_read(text: str, names: tuple[str, ...]) -> None:
    assert parse_augment(text) == names
    ImagePipeline(32, augment=names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.augment is empty; use none, or any of flip, pad_crop, randaugment, trivialaugment"),
        ("flipp", "data.augment must be none, or any of flip, .*, not 'flipp'; did you mean flip"),
        ("flip randaug", "not 'randaug'; did you mean randaugment"),
        ("flip/pad_crop", "not 'flip/pad_crop'"),
        ("Flip", "not 'Flip'; did you mean flip"),
        ("none flip", "data.augment='none flip': none stands alone; take it out, or the others"),
        ("none none", "none stands alone"),
        ("flip flip", "data.augment='flip flip' names flip twice"),
        ("randaugment trivialaugment", "choose one of randaugment and trivialaugment, not both"),
    ],
)
def test_augment_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_augment(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "data.image_size must be at least 1, not 0"),
        ({"crop": "center"}, "data.crop must be one of squash, .*, not 'center'; did you mean center_crop"),
        ({"augment": ("mixup",)}, "data.augment must be none, or any of .*, not 'mixup'"),
        ({"augment": ("randaugment", "flip")}, "order of use; pass it through parse_augment"),
        ({"augment": ("randaugment", "trivialaugment")}, "not both"),
        ({"size": 7, "augment": ("pad_crop",)}, "pad_crop shifts by up to data.image_size / 8 pixels, none at 7"),
        ({"crop_scale": (0.0, 1.0)}, r"data.crop_scale must be two numbers 0 < from <= to <= 1, not 0, 1"),
        ({"crop_scale": (0.5, 0.4)}, "data.crop_scale .* not 0.5, 0.4"),
        ({"crop_scale": (0.5, 1.1)}, "data.crop_scale .* not 0.5, 1.1"),
        ({"crop_ratio": (-1.0, 1.0)}, "data.crop_ratio must be two numbers 0 < from <= to, not -1, 1"),
        ({"crop_ratio": (1.0, float("inf"))}, "data.crop_ratio .* not 1, inf"),
        ({"crop_ratio": (float("nan"), 1.0)}, "data.crop_ratio .* not nan, 1"),
        ({"crop_fraction": 0.0}, "data.crop_fraction must be above 0 and at most 1, not 0.0"),
        ({"crop_fraction": 1.01}, "data.crop_fraction .* not 1.01"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePipeline(**{"size": 32, **settings})


def test_squash_is_the_authors_and_in_full() -> None:
    pipeline = ImagePipeline(32)
    assert pipeline.deterministic and pipeline.boxes(IDS, WIDTHS, HEIGHTS, 0) is None
    for data in FILES:
        expected = np.asarray(Resize((32, 32))(Image.fromarray(decode_rgb(data))))
        assert np.array_equal(pipeline.read(data, None), expected)
        assert np.array_equal(pipeline.from_decoded(decode_rgb(data), None), expected)
        assert np.array_equal(pipeline.whole(decode_rgb(data)), expected)
        assert np.array_equal(pipeline.read_whole(data, 3, 1), expected)


def test_center_crop_is_resize_and_center_crop() -> None:
    """Exactly so where no size is rounded: torchvision resizes the whole image first."""
    pipeline = ImagePipeline(56, "center_crop", crop_fraction=0.875)
    image = picture(128, 192)
    data = encode(image, "PNG")
    assert pipeline.deterministic
    boxes_B4 = pipeline.boxes(np.array([7]), np.array([192]), np.array([128]), 0)
    assert boxes_B4 is not None and boxes_B4.tolist() == [[8, 40, 112, 112]]
    found = pipeline.read(data, boxes_B4[0])
    theirs = np.asarray(Compose([Resize(64), CenterCrop(56)])(Image.fromarray(image)))
    assert np.abs(found.astype(int) - theirs.astype(int))[1:-1, 1:-1].max() <= 1
    assert np.array_equal(found, squash(image[8:120, 40:152], 56))
    assert np.array_equal(pipeline.whole(image), found) and np.array_equal(pipeline.read_whole(data, 0, 0), found)


def test_random_crops_are_drawn_anew_in_every_epoch() -> None:
    pipeline = ImagePipeline(24, "random_resized_crop", seed=3, crop_scale=(0.3, 0.9), crop_ratio=(0.5, 2.0))
    assert not pipeline.deterministic
    boxes_B4 = pipeline.boxes(IDS, WIDTHS, HEIGHTS, 5)
    drawn_B4 = random_resized_boxes(IDS, WIDTHS, HEIGHTS, 3, 5, (0.3, 0.9), (0.5, 2.0))
    assert np.array_equal(boxes_B4, aligned_boxes(drawn_B4, 24))
    assert not np.array_equal(boxes_B4, pipeline.boxes(IDS, WIDTHS, HEIGHTS, 6))
    for data, box, sample_id in zip(FILES, boxes_B4, IDS.tolist(), strict=True):
        crop = pipeline.read(data, box)
        assert np.array_equal(crop, decode_crop(data, box, 24))
        assert np.array_equal(pipeline.read_whole(data, sample_id, 5), crop)
        whole = pipeline.from_decoded(decode_rgb(data), box)
        assert np.array_equal(whole, resize_crop(decode_rgb(data), box.tolist(), 24))
        assert np.array_equal(pipeline.whole(decode_rgb(data), sample_id, 5), whole)


@pytest.mark.parametrize("crop", TRAIN_CROPS)
def test_straight_into_the_slots_of_a_batch(crop: str) -> None:
    pipeline = ImagePipeline(32, crop, seed=1)
    boxes_B4 = pipeline.boxes(IDS, WIDTHS, HEIGHTS, 0)
    batch = np.full((len(FILES) + 1, 32, 32, 3), 77, dtype=np.uint8)
    for slot, data in enumerate(FILES):
        box = None if boxes_B4 is None else boxes_B4[slot]
        expected, decoded = pipeline.read(data, box), decode_rgb(data)
        assert np.shares_memory(pipeline.read(data, box, batch[slot]), batch)
        assert np.array_equal(batch[slot], expected)
        expected, batch[slot] = pipeline.from_decoded(decoded, box), 0
        pipeline.from_decoded(decoded, box, batch[slot])
        assert np.array_equal(batch[slot], expected)
    assert np.all(batch[-1] == 77)


@pytest.mark.parametrize("crop", ["random_resized_crop", "center_crop"])
def test_a_box_of_another_image_is_an_error_of_the_image(crop: str) -> None:
    pipeline, box = ImagePipeline(8, crop), [0, 0, 91, 50]
    for data in FILES[:2]:
        with pytest.raises(ImageError, match=r"has 120 x 90 pixels, and the crop of 50 x 91 .* lies outside"):
            pipeline.read(data, box)
        with pytest.raises(ImageError, match="lies outside"):
            pipeline.from_decoded(decode_rgb(data), box)
    with pytest.raises(ImageError):
        pipeline.read(FILES[0][:200], [0, 0, 9, 9])


def test_a_flipped_batch_is_that_of_earlier_versions() -> None:
    """Squashed, mirrored by the hash of (seed, epoch, id): runs resumed from them go on with the same pixels."""
    pipeline = ImagePipeline(24, augment=("flip",), seed=9)
    images_BHWC = np.stack([pipeline.read(data, None) for data in FILES])
    pipeline.finish(images_BHWC, IDS, 4)
    mirrored_B = flips(IDS, 9, 4)
    assert 0 < mirrored_B.sum() < len(IDS)
    for image, data, mirrored in zip(images_BHWC, FILES, mirrored_B, strict=True):
        expected = squash(decode_rgb(data), 24)
        assert np.array_equal(image, expected[:, ::-1] if mirrored else expected)


def test_batches_are_finished_in_order() -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    ids_B, expected = np.arange(30), images_BHWC.copy()
    ImagePipeline(32, augment=("flip", "pad_crop", "randaugment"), seed=2).finish(images_BHWC, ids_B, 1)
    flipped_B = flips(ids_B, 2, 1)
    expected[flipped_B] = expected[flipped_B][:, :, ::-1]
    pad_crop_images(expected, pad_crop_offsets(ids_B, 2, 1, 4), 4)
    randaugment(expected, ids_B, 2, 1)
    assert np.array_equal(images_BHWC, expected)
    ImagePipeline(32, seed=2).finish(images_BHWC, ids_B, 1)  # nothing asked for, nothing done
    assert np.array_equal(images_BHWC, expected)


@pytest.mark.parametrize("crop", TRAIN_CROPS)
@pytest.mark.parametrize("augment", [("flip", "pad_crop", "trivialaugment"), ("pad_crop", "randaugment")])
def test_pixels_do_not_depend_on_batch_or_thread(crop: str, augment: tuple[str, ...]) -> None:
    pipeline = ImagePipeline(24, crop, augment, seed=6)

    def build(some: list[int]) -> dict[int, bytes]:
        slots = np.array(some)
        boxes_B4 = pipeline.boxes(IDS[slots], WIDTHS[slots], HEIGHTS[slots], 8)
        images_BHWC = np.empty((len(some), 24, 24, 3), dtype=np.uint8)
        for slot, number in enumerate(some):
            pipeline.read(FILES[number], None if boxes_B4 is None else boxes_B4[slot], images_BHWC[slot])
        pipeline.finish(images_BHWC, IDS[slots], 8)
        return {number: image.tobytes() for number, image in zip(some, images_BHWC, strict=True)}

    whole = build(list(range(len(FILES))))
    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(build, [[9], [3, 1], [8, 7, 6, 5], [0, 2, 4], list(range(9, -1, -1))]):
            assert all(whole[number] == pixels for number, pixels in part.items())


def test_names() -> None:
    assert set(EVAL_CROPS) <= set(TRAIN_CROPS) and all(ImagePipeline(8, crop).deterministic for crop in EVAL_CROPS)
    assert parse_augment(" ".join(AUGMENTATIONS[:3])) == AUGMENTATIONS[:3]
