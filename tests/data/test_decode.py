"""decode_rgb on every kind of file that data sets really hold."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oat_dist.data.images.decode import ImageError, decode_rgb, jpeg_size

modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def pixels(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    """A smooth picture: JPEG changes it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def far_off(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of two pictures of the same size."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_come_back_exactly(kind: str) -> None:
    picture = pixels()
    data = encode(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode_rgb(data), picture)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 60}])
def test_jpeg_equals_simplejpeg(options: dict[str, object]) -> None:
    data = encode(pixels(), "JPEG", **{"quality": 95, **options})
    assert np.array_equal(decode_rgb(data), simplejpeg.decode_jpeg(data, colorspace="RGB"))
    assert far_off(decode_rgb(data), pixels()) < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    grey = pixels()[:, :, 0]
    rgb = decode_rgb(encode(grey, kind))
    assert rgb.shape == (20, 30, 3) and np.all(rgb == rgb[:, :, :1])
    assert far_off(rgb[:, :, 0], grey) < 8


def test_one_bit_images_are_black_and_white() -> None:
    bits = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    rgb = decode_rgb(encode(Image.fromarray(bits).convert("1"), "PNG"))
    assert np.array_equal(rgb[:, :, 1], bits)


@pytest.mark.parametrize(
    ("kind", "transparency"),  # GIF knows one transparent colour only
    [("PNG", None), ("PNG", 1), ("PNG", bytes([0, 128, 255])), ("GIF", None), ("GIF", 1)],
)
def test_palettes_give_their_colours_and_lose_transparency(kind: str, transparency: int | bytes | None) -> None:
    colours = np.array([[250, 10, 20], [1, 200, 3], [7, 8, 90]], dtype=np.uint8)
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    data = encode(image, kind, **({} if transparency is None else {"transparency": transparency}))
    assert np.array_equal(decode_rgb(data), colours[indices])


def test_alpha_is_dropped() -> None:
    rgba = np.dstack([pixels(), np.full((20, 30), 7, dtype=np.uint8)])
    assert np.array_equal(decode_rgb(encode(rgba, "PNG")), pixels())


def test_cmyk_jpeg_is_converted() -> None:
    data = encode(Image.fromarray(pixels()).convert("CMYK"), "JPEG", quality=95)
    assert simplejpeg.decode_jpeg_header(data)[2] == "CMYK"
    assert far_off(decode_rgb(data), pixels()) < 8
    assert far_off(decode_rgb(data), 255 - pixels()) > 40  # the inverse is the classic mistake


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    levels = np.array([[0, 255, 256], [32768, 40000, 65535]], dtype=np.uint16)
    expected = np.repeat((levels // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    for data in (
        encode(levels, "PNG"),
        encode(levels, "TIFF"),
        b"P5 3 2 65535\n" + levels.astype(">u2").tobytes(),
    ):
        assert np.array_equal(decode_rgb(data), expected)


def test_sixteen_bit_rgb_keeps_its_upper_bits() -> None:
    levels = np.array([[[0, 300, 65535], [256, 511, 512]]], dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )
    assert decode_rgb(data).tolist() == [[[0, 1, 255], [1, 1, 2]]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_without_a_defined_range_are_refused(kind: type) -> None:
    with pytest.raises(ImageError, match=r"32 bits a pixel.*save the image with 8 or 16 bits"):
        decode_rgb(encode(np.arange(6).reshape(2, 3).astype(kind), "TIFF"))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.fromarray(np.full((5, 6, 3), level, dtype=np.uint8)) for level in (10, 120, 250)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {"default_image": False})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert np.array_equal(decode_rgb(data), np.full((5, 6, 3), 10, dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_cut_is_noticed(kind: str) -> None:
    data = encode(pixels(), kind, **({"progressive": True} if kind == "JPEG" else {}))
    assert decode_rgb(data).shape == (20, 30, 3)
    for keep in (0, 1, 2, 10, len(data) // 4, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError) as caught:
            decode_rgb(data[:keep])
        assert str(caught.value) and "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_an_empty_file_is_called_so() -> None:
    with pytest.raises(ImageError, match="the file is empty"):
        decode_rgb(b"")


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]), st.binary(max_size=200)
)
@modest
def test_random_bytes_are_refused(start: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        decode_rgb(start + rest)


@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]), st.integers(0, 10**9), st.integers(1, 255))
@modest
def test_a_flipped_byte_is_read_or_refused_but_never_a_crash(kind: str, place: int, change: int) -> None:
    data = bytearray(encode(pixels(), kind))
    data[place % len(data)] ^= change
    try:
        image = decode_rgb(bytes(data))
    except ImageError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def bomb(kind: str) -> bytes:
    """A small file that claims 65,535 x 65,535 pixels (JPEG), or 20,000 x 20,000 (PNG)."""
    data = bytearray(encode(pixels(), kind))
    if kind == "JPEG":
        size = data.index(b"\xff\xc0") + 5
        data[size : size + 4] = b"\xff" * 4
    else:
        data[16:24] = struct.pack(">II", 20_000, 20_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_before_they_take_memory(kind: str) -> None:
    with pytest.raises(ImageError, match="decompression bombs"):
        decode_rgb(bomb(kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_pixel_limit_is_pillows_whatever_the_warning_filters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(pixels(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30)
    assert decode_rgb(data).shape == (20, 30, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30 - 1)  # Pillow by itself would warn and go on
    for action in ("ignore", "error"):
        with warnings.catch_warnings(), pytest.raises(ImageError, match="more than 599 pixels"):
            warnings.simplefilter(action)
            decode_rgb(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_rgb(data).shape == (20, 30, 3)


def test_many_threads_leave_the_warning_filters_alone() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3)
    image.putpalette(bytes(range(9)))
    data = encode(image, "PNG", transparency=b"\0\x80\xff")
    expected = decode_rgb(data)
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
    try:
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(lambda _: decode_rgb(data), range(400)))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before
    assert all(np.array_equal(image, expected) for image in images)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (5, 700), (300, 200)])
def test_a_plain_png_does_not_need_pillow(monkeypatch: pytest.MonkeyPatch, height: int, width: int, grey: bool) -> None:
    """By far the most PNGs are such: CIFAR-10 and digits are packed so. Noise of 300 x 200 pixels takes many chunks."""
    picture = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = np.repeat(picture[:, :, :1], 3, axis=2) if grey else picture
    data = encode(picture[:, :, 0] if grey else picture, "PNG")
    cut = [data[:keep] for keep in (30, 40, len(data) - 13, len(data) - 1)]
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", None)
        assert np.array_equal(decode_rgb(data), picture)
        for part in cut:
            with pytest.raises(ImageError, match="not callable"):  # judged by Pillow
                decode_rgb(part)


def test_whatever_byte_of_a_png_is_wrong_its_pixels_are_right_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    data, refused = encode(picture, "PNG"), 0
    for place in range(len(data)):
        for change in (1, 0x20, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= change
            try:
                assert np.array_equal(decode_rgb(bytes(damaged)), picture), place
            except ImageError:
                refused += 1
    assert refused > len(data)
    assert capfd.readouterr().err == ""  # libpng would complain of each


def test_a_jpeg_goes_straight_into_a_slot_that_fits() -> None:
    batch = np.zeros((3, 20, 30, 3), dtype=np.uint8)
    data = encode(pixels(), "JPEG")
    assert decode_rgb(data, batch[1]).base is batch
    assert np.array_equal(batch[1], decode_rgb(data)) and not batch[0].any() and not batch[2].any()
    for other in (encode(pixels(10, 20), "JPEG"), encode(pixels(40, 50), "JPEG"), encode(pixels(), "PNG")):
        image = decode_rgb(other, batch[1])
        assert np.array_equal(image, decode_rgb(other)) and not np.shares_memory(image, batch)
    with pytest.raises(ImageError):
        decode_rgb(data[:-40], batch[1])


def test_a_jpegs_size_comes_from_its_header() -> None:
    assert jpeg_size(encode(pixels(), "JPEG")[:-60]) == (30, 20)
    assert jpeg_size(encode(pixels(), "PNG")) is None
    assert jpeg_size(b"\xff\xd8nothing") is None
