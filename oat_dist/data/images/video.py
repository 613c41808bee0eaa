"""The middle frame of a video, exactly: with n frames that decode, counted from 0, number n // 2.

Videos are decoded from the start to the end. Seeking is off by one wherever frames are stored out of order
(B-frames), and the number of frames in the header is not always the number that decodes, so neither is used. What
comes out is what ffmpeg's `-vf select=eq(n\\,N)` gives, pixel by pixel: the same conversion to RGB by the same library.
Only one decoded frame is kept at a time. A rotation in the container is not applied, just as EXIF's is not to images.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from oat_dist.data.images.png import encode_png
from oat_dist.errors import DataError

if TYPE_CHECKING:
    import av

__all__ = ["middle_frame", "middle_frame_png", "require_video_decoder"]

_PYAV = 16  # FFmpeg 8; the decoders of versions before repeat a frame where a picture is not coded
# By content, whatever the name says. FFmpeg knows play lists too, which would make it open other files.
_CONTAINERS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
_FIRST_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"))
_NOT_FINALISED = frozenset((0, 0xFFFFFFFF))  # what a recorder leaves that never came back to write the size


def require_video_decoder() -> None:
    """Raises `DataError`, with the remedy, where PyAV is not installed or too old."""
    if importlib.util.find_spec("av") is None:
        raise DataError("videos need PyAV, which is not installed; run: pip install 'oat_dist[video]'")
    import av

    if int(av.__version__.partition(".")[0]) < _PYAV:
        raise DataError(f"PyAV {av.__version__} is too old for exact frames; run: pip install -U 'oat_dist[video]'")


def middle_frame_png(path: Path | str) -> bytes:
    """`middle_frame` as a PNG file. Errors as there."""
    return encode_png(middle_frame(path), compress=True)


def middle_frame(path: Path | str) -> np.ndarray:
    """Frame n // 2 of the n frames of a video, (H, W, 3) uint8 RGB.

    Frames that do not decode are not counted; what the decoder conceals counts, as in ffmpeg.

    Raises:
        DataError: PyAV is missing, or the file is no video, is cut short, has no frame that decodes, or its middle
            frame is damaged; with the bare reason, the same for the same bytes.
        OSError: the file cannot be read.
    """
    require_video_decoder()
    from av.error import FFmpegError

    with Path(path).open("rb") as file:
        _refuse_cut_short(file)
        try:
            # A packet mostly holds a frame, and counting packets is cheap: one decoding is mostly enough.
            guess = _count_packets(file) // 2
            count, frame = _decode(file, guess)
            if count and count // 2 != guess:
                count, frame = _decode(file, count // 2)
            if frame is None:
                raise DataError("the video holds no frame that can be decoded")
            if frame.is_corrupt:
                raise DataError(f"frame {count // 2} of {count}, the middle one, is damaged")
            return _to_rgb(frame)
        except FFmpegError as error:
            raise DataError(f"not a video that can be decoded ({error.strerror})") from error


def _open(file: BinaryIO) -> tuple[Any, Any]:
    """The container, from its start, and its video stream."""
    import av

    file.seek(0)
    container = av.open(file, "r", options={"format_whitelist": _CONTAINERS}, metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise DataError("the file holds no video stream")
    stream.codec_context.thread_count = 1  # the packer uses the other cores for other videos
    return container, stream


def _count_packets(file: BinaryIO) -> int:
    container, stream = _open(file)
    with container:
        return sum(packet.size > 0 for packet in container.demux(stream))


def _decode(file: BinaryIO, wanted: int) -> tuple[int, av.VideoFrame | None]:
    """The number of frames that decode, and number `wanted` of them, or None if there are not so many."""
    container, stream = _open(file)
    count, kept = 0, None
    with container:
        for frame in _frames(container, stream):
            if count == wanted:
                kept = frame
            count += 1
    return count, kept


def _frames(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Frames in the order in which they are shown. The last packet is empty: the decoder then gives what it holds."""
    from av.error import InvalidDataError

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:  # goes on behind the damage, as ffmpeg does
            continue
        yield from frames


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, by the filter that ffmpeg inserts, with its setting."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    chain = [source, graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24"), graph.add("buffersink")]
    for one, following in itertools.pairwise(chain):
        one.link_to(following)
    graph.configure()
    graph.push(frame)
    converted: Any = graph.pull()
    return converted.to_ndarray()


def _refuse_cut_short(file: BinaryIO) -> None:
    """AVI and MP4 say how long they are; FFmpeg decodes what is there of one cut short, in silence."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError("the file is empty")
    announced = _announced_size(file, size)
    if announced > size:
        raise DataError(f"cut short: {size:,} of {announced:,} bytes are there; fetch the video again")


def _announced_size(file: BinaryIO, size: int) -> int:
    """Where the outermost parts of the file end; at least `size` only when it is known to be longer."""
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        length = struct.unpack("<I", head[4:8])[0]
        return 0 if length in _NOT_FINALISED else 8 + length
    if head[4:8] not in _FIRST_BOXES:
        return 0
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            return position + 8
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # 0: to the end of the file; others: not a box
            return 0
        position += length
    return position
