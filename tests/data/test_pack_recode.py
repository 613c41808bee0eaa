"""--short-side and --reencode: which pixels are stored, in which format, and that the manifest says so."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from packing_checks import contents, image, some_samples
from PIL import Image

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_shards
from oat_dist.data.packing.recode import Recode
from oat_dist.errors import DataError


def recode(data: bytes, short_side: int | None = None, reencode: str | None = None) -> tuple[bytes, str]:
    """The stored bytes and their extension."""
    recoding = Recode.parse(short_side, reencode)
    assert recoding is not None
    stored, info = recoding.apply(data)
    pixels = decode_rgb(stored)
    assert (info.height, info.width) == pixels.shape[:2]
    return stored, info.extension


def stored_images(shards: ShardSet) -> list[bytes]:
    found = []
    for i in range(len(shards)):
        path = shards.folder / shards.manifest.shards[shards.index.shard[i]].name
        start = int(shards.index.offset[i])
        found.append(path.read_bytes()[start : start + int(shards.index.length[i])])
    return found


def lanczos(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(decode_rgb(data)).resize(size, Image.Resampling.LANCZOS))


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "shrunk"),
    [((40, 20), (20, 10)), ((20, 40), (10, 20)), ((35, 21), (17, 10)), ((21, 34), (10, 16)), ((11, 300), (10, 273))],
)
def test_short_side_shrinks_with_an_antialiasing_filter(size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    data = image("PNG", size=size)
    stored, kind = recode(data, 10)
    assert kind == "png" and np.array_equal(decode_rgb(stored), lanczos(data, shrunk))


@pytest.mark.parametrize("size", [(10, 10), (10, 500), (9, 30), (1, 1)])
def test_small_images_keep_their_bytes(size: tuple[int, int]) -> None:
    data = image("JPEG", size=size)
    assert recode(data, 10) == (data, "jpg")


def test_shrunk_images_keep_their_format() -> None:
    expected = {
        "JPEG": ("jpg", {"quality": 95, "subsampling": 0}),
        "WEBP": ("webp", {"quality": 95}),
        "PNG": ("png", {}),
        "BMP": ("bmp", {}),
        "TIFF": ("tif", {}),
        "PPM": ("ppm", {}),
    }
    for kind, (extension, options) in expected.items():
        data = image(kind, size=(40, 20))
        assert recode(data, 10) == (saved(lanczos(data, (20, 10)), kind, **options), extension)
    stored, extension = recode(gif := image("GIF", size=(40, 20)), 10)
    assert extension == "png"  # a GIF would lose colours
    assert np.array_equal(decode_rgb(stored), lanczos(gif, (20, 10)))


def test_pixels_are_those_that_training_decodes() -> None:
    """Turned by EXIF, half transparent, 16 bits: as the decoder sees them; grey stays grey."""
    turned = image("JPEG", size=(40, 20), exif=_orientation(6))
    stored, _ = recode(turned, 10)
    assert decode_rgb(stored).shape == (10, 20, 3)

    rgba = np.random.default_rng(0).integers(0, 256, (20, 40, 4), dtype=np.uint8)
    data = saved(rgba, "PNG")
    assert np.array_equal(decode_rgb(recode(data, None, "png")[0]), rgba[:, :, :3])

    deep = np.random.default_rng(0).integers(0, 65536, (20, 40), dtype=np.uint16)
    stored, _ = recode(saved(deep, "PNG"), None, "png")
    with Image.open(io.BytesIO(stored)) as opened:
        assert opened.mode == "L" and np.array_equal(np.asarray(opened), (deep >> 8).astype(np.uint8))

    grey = saved(rgba[:, :, 0], "JPEG")
    with Image.open(io.BytesIO(recode(grey, 10)[0])) as opened:
        assert (opened.mode, opened.size) == ("L", (20, 10))


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    ("option", "kind", "settings"),
    [
        ("jpeg", "JPEG", {"quality": 95, "subsampling": 0}),
        ("jpeg:60", "JPEG", {"quality": 60, "subsampling": 0}),
        ("webp:60", "WEBP", {"quality": 60}),
        ("png", "PNG", {}),
    ],
)
def test_reencode_writes_all_images_anew(tmp_path: Path, option: str, kind: str, settings: dict[str, int]) -> None:
    samples = sorted(some_samples(9))
    shards = write_shards(samples, tmp_path / "train", reencode=option, source="mine")
    assert stored_images(shards) == [saved(decode_rgb(sample.data), kind, **settings) for sample in samples]
    assert shards.manifest.source.startswith(f"mine; written as {option}")


def test_the_manifest_says_how_the_pixels_were_made(tmp_path: Path) -> None:
    samples = [(str(i), 0, image("PNG", seed=i, size=(40, 20 + i))) for i in range(4)]
    made = {
        name: write_shards(samples, tmp_path / name / "train", **options).manifest
        for name, options in {
            "kept": {},
            "shrunk": {"short_side": 21},
            "jpeg": {"reencode": "jpeg:90"},
            "both": {"short_side": 21, "reencode": "png"},
        }.items()
    }
    assert {name: manifest.source for name, manifest in made.items()} == {
        "kept": "custom",
        "shrunk": "custom; short side at most 21 (Lanczos, JPEG and WebP quality 95)",
        "jpeg": "custom; written as jpeg:90",
        "both": "custom; short side at most 21 (Lanczos), written as png",
    }
    assert made["shrunk"].image_sizes == {"min": [37, 20], "median": [38, 21], "max": [40, 21]}
    assert made["shrunk"].num_bytes < made["kept"].num_bytes


def test_recoded_shards_keep_to_their_size_and_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    samples = [(f"{i:03d}", i % 2, image("JPEG", seed=i, size=(60, 50))) for i in range(150)]
    for workers in (1, 2):
        output = tmp_path / str(workers) / "train"
        shards = write_shards(samples, output, short_side=20, reencode="png", shard_bytes=40_960, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    sizes = [shard.size for shard in shards.manifest.shards]
    assert max(sizes) == 40_960 and len(sizes) > 5 and min(sizes[:-1]) > 30_000  # full, although cut while written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "short_side is 0; it must be at least 1 pixel"),
        ({"reencode": "gif"}, "reencode is 'gif'; write jpeg, jpeg:QUALITY, png, webp or webp:QUALITY"),
        ({"reencode": "jpeg:"}, "reencode is 'jpeg:'; write jpeg"),
        ({"reencode": "jpeg:0"}, "reencode is 'jpeg:0'; quality goes from 1 to 100"),
        ({"reencode": "webp:101"}, "reencode is 'webp:101'; quality goes from 1 to 100"),
        ({"reencode": "png:9"}, "reencode is 'png:9'; PNG is lossless and has no quality"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as error:
        write_shards(some_samples(2), tmp_path / "out" / "train", **options)
    assert str(error.value).startswith(message) and not (tmp_path / "out").exists()


def test_an_image_too_large_for_the_format_stops_or_is_skipped(tmp_path: Path) -> None:
    wide = saved(np.zeros((2, 17_000, 3), dtype=np.uint8), "PNG")  # a WebP has at most 16,383 pixels a side
    samples = [("a", 0, wide), ("b", 0, image())]
    with pytest.raises(DataError, match=r"sample 'a': unreadable image \(cannot be written as WEBP: "):
        write_shards(samples, tmp_path / "train", reencode="webp")
    shards = write_shards(samples, tmp_path / "train", reencode="webp", on_bad="skip")
    assert len(shards) == 1 and shards.manifest.skipped[0]["name"] == "a"


def test_a_damaged_image_stays_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 'a': unreadable image"):
        write_shards([("a", 0, image(size=(90, 90))[:500])], tmp_path / "train", short_side=4)
