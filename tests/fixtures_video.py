"""Small real videos, written with PyAV. Each frame shows its own number: eight blocks, black or white, are its bits."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BLOCK_W, BLOCK_H = 64, 48, 16, 24
RATE = 24


def numbered_frame(number: int) -> np.ndarray:
    """(48, 64, 3) uint8."""
    bits = [(number >> bit) & 1 for bit in range(8)]
    grey = np.array(bits, dtype=np.uint8).reshape(2, 4).repeat(BLOCK_H, 0).repeat(BLOCK_W, 1) * 160 + 40
    return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))


def number_shown(rgb: np.ndarray) -> int:
    """The number that a decoded frame shows."""
    assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8
    blocks = rgb.reshape(2, BLOCK_H, 4, BLOCK_W, 3).mean(axis=(1, 3, 4)).ravel()
    return sum(int(block > 120) << bit for bit, block in enumerate(blocks))


def encoded(count: int, *, codec: str = "mpeg4", b_frames: int = 2) -> list[bytes]:
    """The packets of a video of `count` frames, in the order in which they are stored."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    context.time_base, context.framerate = Fraction(1, RATE), Fraction(RATE)
    context.max_b_frames, context.gop_size, context.thread_count = b_frames, 250, 1
    if codec == "libx264":
        context.options = {"b-adapt": "0", "scenecut": "0"}
    packets = []
    for number in range(count):
        frame = av.VideoFrame.from_ndarray(numbered_frame(number), "rgb24")
        frame.pts = number
        packets += context.encode(frame)
    return [bytes(packet) for packet in (*packets, *context.encode(None))]


def write_avi(path: Path, packets: list[bytes], *, codec: str = "mpeg4") -> Path:
    """An AVI of these packets, as they are; an empty one is a frame that the recorder dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for position, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, RATE)
            packet.pts = packet.dts = position
            packet.is_keyframe = not position
            container.mux(packet)
    return path


def write_video(path: Path, count: int, *, codec: str = "mpeg4", b_frames: int = 2) -> Path:
    """A video of `count` frames in the container that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        context = stream.codec_context
        context.max_b_frames, context.gop_size, context.thread_count = b_frames, 250, 1
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), "rgb24")))
        container.mux(stream.encode(None))
    return path
