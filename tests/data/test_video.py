"""The middle frame of a video: exactly that one, and pixel by pixel ffmpeg's."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from fixtures_video import HEIGHT, WIDTH, encoded, number_shown, numbered_frame, write_avi, write_video
from PIL import Image

from oat_dist.data.images.png import encode_png
from oat_dist.data.images.video import middle_frame, middle_frame_png
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

# A picture that is not coded, of 6 bytes: after two frames in one packet it stands for the second.
NO_PICTURE = bytes([0, 0, 1, 0xB6, 0b01_0_1_0000, 0b0_1_0_01111])


def frames_of(path: Path) -> list[np.ndarray]:
    """All frames that decode, one by one."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.error.InvalidDataError:
                continue
    return frames


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 25])
@pytest.mark.parametrize(
    ("codec", "container", "b_frames"),
    [("mpeg4", "avi", 2), ("mpeg4", "mp4", 0), ("libx264", "mp4", 3), ("libx264", "mkv", 2)],
)
def test_frame_n_half_of_n(tmp_path: Path, codec: str, container: str, b_frames: int, count: int) -> None:
    path = write_video(tmp_path / f"x.{container}", count, codec=codec, b_frames=b_frames)
    frames = frames_of(path)
    assert [number_shown(frame) for frame in frames] == list(range(count))
    assert number_shown(middle_frame(path)) == count // 2
    if b_frames and count >= 9:  # stored out of order, or this test shows nothing
        with av.open(str(path)) as opened:
            assert any(frame.pict_type == PictureType.B for frame in opened.decode(video=0))


def packed_bitstream(count: int) -> list[bytes]:
    """As DivX wrote them: each B-frame in one packet with the frame it needs, then a packet of nothing."""
    first, *rest = encoded(count, b_frames=1)
    # the encoder's name is where a decoder learns it
    marked = re.sub(rb"\x00\x00\x01\xb2Lavc[0-9.]{9}", b"\x00\x00\x01\xb2DivX503b1393p", first)
    assert marked != first
    packets = [marked]
    while len(rest) >= 2:
        packets += [rest.pop(0) + rest.pop(0), NO_PICTURE]
    return packets + rest


@pytest.mark.parametrize("count", [2, 7, 8, 21])
def test_what_avi_files_hold_besides_frames(tmp_path: Path, count: int) -> None:
    packets = encoded(count)
    variants = {
        "plain": packets,
        "packed": packed_bitstream(count),
        "pictures not coded at the end": [*packets, *[NO_PICTURE] * 9],
        "dropped frames": [packets[0], b"", b"", *packets[1:], b"", b"", b""],
        "packets of something else": [*packets, *[b"something else"] * 7],
    }
    for name, variant in variants.items():
        path = write_avi(tmp_path / f"{name}.avi", variant)
        assert number_shown(middle_frame(path)) == count // 2, name
    with av.open(str(tmp_path / "pictures not coded at the end.avi")) as container:
        assert container.streams.video[0].frames == count + 9  # what the header says would be wrong


REAL = {  # SHA-256 of the RGB pixels of `ffmpeg -i X -vf select=eq(n\,N) -vsync 0 -frames:v 1 -pix_fmt rgb24` (x86-64)
    "v_ApplyEyeMakeup_g01_c01.avi": (164, "71c0878c26b5abcf8c3ac233be17ff0f841d7305c0c68bd560ce9a2485abc242"),
    "v_BaseballPitch_g01_c01.avi": (107, "b2f8c2d7a6e42b3f27e14a80b8eb49647ee5898e97c60c1c1626faaa46381b6d"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_videos_give_the_pixels_of_ffmpeg(name: str) -> None:
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip(f"needs ucf101/{name} in the folder named by OAT_TEST_DATA")
    path = Path(folder) / "ucf101" / name
    count, digest = REAL[name]
    frame = middle_frame(path)
    assert frame.shape == (240, 320, 3) and sha256_bytes(frame.tobytes()) == digest
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(middle_frame_png(path)))), frame)
    frames = frames_of(path)
    assert len(frames) == count
    for neighbour in (count // 2 - 1, count // 2 + 1):
        assert sha256_bytes(frames[neighbour].tobytes()) != digest


def test_png_of_any_size_gives_its_pixels_back() -> None:
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (32, 32), (7, 300), (301, 2)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for compress in (False, True):
            for given in (pixels, np.asfortranarray(pixels), pixels[::-1, ::-1]):
                with Image.open(io.BytesIO(encode_png(given, compress=compress))) as image:
                    assert image.format == "PNG" and image.mode == "RGB"
                    assert np.array_equal(np.asarray(image), given)
    smooth = np.zeros((64, 64, 3), np.uint8) + np.arange(64, dtype=np.uint8)[:, None, None]
    assert len(encode_png(smooth, compress=True)) < 500 < len(encode_png(smooth, compress=False))


def sound_only(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def test_files_that_have_no_middle_frame(tmp_path: Path) -> None:
    avi = write_avi(tmp_path / "whole.avi", encoded(20)).read_bytes()
    mp4 = write_video(tmp_path / "whole.mp4", 20).read_bytes()
    no_frame = write_avi(tmp_path / "no frame.avi", [b"something else"] * 5).read_bytes()
    damaged = encoded(21, b_frames=0)
    damaged[10] = damaged[10][:12] + bytes(40) + damaged[10][52:]
    broken = write_avi(tmp_path / "broken.avi", damaged).read_bytes()
    files = {
        "empty": (b"", "the file is empty"),
        "text": (b"no video " * 50, "not a video that can be decoded (Invalid data found when processing input)"),
        "cut.avi": (
            avi[:-500],
            f"cut short: {len(avi) - 500:,} of {len(avi):,} bytes are there; fetch the video again",
        ),
        "head.avi": (avi[:100], f"cut short: 100 of {len(avi):,} bytes are there; fetch the video again"),
        "cut.mp4": (mp4[:-9], f"cut short: {len(mp4) - 9:,} of {len(mp4):,} bytes are there; fetch the video again"),
        "no frame.avi": (no_frame, "the video holds no frame that can be decoded"),
        "damaged.avi": (broken, "frame 10 of 21, the middle one, is damaged"),
        "sound.mov": (sound_only(tmp_path / "sound.mov"), "the file holds no video stream"),
        # FFmpeg by itself would open the file that it names
        "list.avi": (b"ffconcat version 1.0\nfile whole.avi\n", "not a video that can be decoded (Invalid argument)"),
        "image.avi": (
            encode_png(numbered_frame(3), compress=True),
            "not a video that can be decoded (Invalid argument)",
        ),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as error:
            middle_frame(tmp_path / name)
        assert str(error.value) == reason, name
    with pytest.raises(FileNotFoundError):
        middle_frame(tmp_path / "missing.avi")
    assert (
        number_shown(middle_frame(tmp_path / "whole.avi")) == number_shown(middle_frame(tmp_path / "whole.mp4")) == 10
    )


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"videos need PyAV, .* run: pip install 'oat_dist\[video\]'"):
        middle_frame(tmp_path / "x.avi")
    monkeypatch.undo()
    monkeypatch.setattr(av, "__version__", "15.1.0")
    with pytest.raises(DataError, match=r"PyAV 15\.1\.0 is too old for exact frames; run: pip install -U"):
        middle_frame(tmp_path / "x.avi")


def test_numbered_frames_show_their_number() -> None:
    """The tests above rest on it."""
    assert numbered_frame(0).shape == (HEIGHT, WIDTH, 3)
    assert [number_shown(numbered_frame(number)) for number in range(256)] == list(range(256))
