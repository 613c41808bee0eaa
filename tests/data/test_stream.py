"""Streaming: real tars through webdataset, on ranks that never run out, and every bad sample named."""

from __future__ import annotations

import io
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.index import ShardSet
from oat_dist.data.plan import Layout
from oat_dist.data.storage import ShardReader
from oat_dist.data.stream import StreamBuilder, StreamLoader, StreamSet
from oat_dist.errors import DataError

TEN = [str(number) for number in range(10)]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(("oat-loader", "oat-stream")):
            thread.join(timeout=5)
            assert not thread.is_alive()


def loader(urls: str, *, samples: int = 100, rank: int = 0, world: int = 1, **options: Any) -> StreamLoader:
    own = {key: options.pop(key) for key in ("on_bad", "max_bad", "label_key", "image_key") if key in options}
    settings = {"image_key": None, "label_key": "cls", **own}
    builder = StreamBuilder(StreamSet(urls, TEN, samples), ImagePipeline(8), **settings)
    return StreamLoader(builder, urls, Layout(16, world), rank, seed=0, shuffle=options.pop("shuffle", 50), **options)


@pytest.fixture(scope="module")
def urls(digits: dict[str, ShardSet]) -> str:
    return f"{digits['train'].folder}/train-{{000000..000002}}.tar"


def images_of(shards: ShardSet) -> dict[bytes, int]:
    """Label by pixels, of every sample."""
    reader = ShardReader(shards)
    found = {decode_rgb(reader.read(i)).tobytes(): int(shards.index.label[i]) for i in range(shards.num_samples)}
    reader.close()
    return found


def test_windows_are_of_the_plan_and_samples_of_the_tars(urls: str, digits: dict[str, ShardSet]) -> None:
    known = images_of(digits["train"])
    windows = list(loader(urls).windows(0, 9))  # an epoch of 100 is six batches of 16 and one of 4
    assert [window.num_samples for window in windows] == [16] * 6 + [4] + [16] * 2
    assert [(w.epoch, w.step_in_epoch) for w in windows[5:8]] == [(0, 5), (0, 6), (1, 0)]
    seen = [
        (image.numpy().tobytes(), int(label))
        for window in windows
        for batch in window.batches
        for image, label in zip(batch.images_BHWC, batch.labels_B, strict=True)
    ]
    assert len(seen) == 132 and all(known[pixels] == label for pixels, label in seen)
    assert len({pixels for pixels, _ in seen}) > 100


def test_ranks_draw_for_themselves_and_none_runs_out(urls: str) -> None:
    first, second = (list(loader(urls, rank=rank, world=2).windows(0, 200)) for rank in (0, 1))
    assert len(first) == len(second) == 200  # 1,600 samples a rank, of 1,438 there are
    assert not torch.equal(first[0].batches[0].images_BHWC, second[0].batches[0].images_BHWC)


def test_the_same_start_draws_the_same_and_a_later_one_others(urls: str) -> None:
    once, again, later = (
        [window.batches[0].images_BHWC for window in loader(urls).windows(start, start + 3)] for start in (0, 0, 7)
    )
    assert all(map(torch.equal, once, again))
    assert not any(torch.equal(a, b) for a in once for b in later)


def test_a_pipe(digits: dict[str, ShardSet]) -> None:
    path = shlex.quote(str(digits["train"].folder / "train-000001.tar"))
    [window] = loader(f"pipe:cat {path}").windows(0, 1)
    assert window.num_valid == 16


def tar_of(path: Path, *samples: dict[str, Any]) -> str:
    with webdataset.TarWriter(str(path)) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:04d}", **sample})
    return str(path)


def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_labels_inside_json(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "a.tar", {"png": png(), "json": {"meta": {"labels": [3, 7]}}})
    [window] = loader(url, label_key="json:meta.labels.1", shuffle=1).windows(0, 1)
    assert window.batches[0].labels_B.tolist() == [7] * 16


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"txt": "a", "cls": 1}, {}, "0000: has no image under jpg;jpeg;png;.*, only cls, txt; set data.stream.image_"),
        ({"png": b"", "txt": "a"}, {}, r"label_key=cls \(there is no 'cls'\); the sample has png, txt; labels are"),
        (
            {"png": b"", "cls": b"cat"},
            {},
            r"no label under .*=cls \('cat' is no whole number\); the sample has cls, png;",
        ),
        ({"png": b"", "cls": b"1_0"}, {}, "is no whole number"),
        (
            {"png": b"", "json": {"a": 1}},
            {"label_key": "json:b"},
            r"label_key=json:b \(there is no 'b'\); .* json, png;",
        ),
        ({"png": b"", "json": b'{"l": Infinity}'}, {"label_key": "json:l"}, r"\(inf is no whole number\)"),
        ({"png": b"", "json": {"l": 0.9}}, {"label_key": "json:l"}, r"\(0.9 is no whole number\)"),
        ({"png": b"", "json": {"l": True}}, {"label_key": "json:l"}, r"\(True is no whole number\)"),
        ({"png": b"", "json": {"l": None}}, {"label_key": "json:l"}, r"\(None is no whole number\)"),
        (
            {"png": b"", "cls": 10},
            {},
            "label 10 is out of range for 10 classes; mend the labels or data.stream",
        ),
        ({"png": b"no", "cls": 1}, {}, "0000: not an image of a known kind; this image cannot be decoded: mend it, or"),
        ({"png": b"no", "cls": 1}, {"on_bad": "skip", "max_bad": 0}, "more undecodable images than data.max_bad=0"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, sample: dict[str, Any], options: Any, message: str) -> None:
    url = tar_of(tmp_path / "bad.tar", sample)
    with pytest.raises(DataError, match=message) as caught:
        list(loader(url, shuffle=1, **options).windows(0, 2))
    assert str(caught.value).startswith(url)


def test_bad_samples_within_the_budget_are_masked(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "a.tar", *({"png": b"no" if n == 3 else png(), "cls": 1} for n in range(32)))
    load = loader(url, shuffle=1, on_bad="skip", max_bad=5)
    windows = list(load.windows(0, 4))
    assert [window.num_valid for window in windows] == [15, 16, 15, 16]
    assert windows[0].batches[0].valid_B is not None and not windows[0].batches[0].valid_B[3]
    # It came twice, and is one image.
    assert load.builder.bad == {f"{url}: 0003": "not an image of a known kind"}
    assert load.builder.shards.describe(f"{url}: 0003") == f"{url}: 0003"


def test_different_bad_samples_use_up_the_budget(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "a.tar", *({"png": b"no" if n < 3 else png(), "cls": 1} for n in range(16)))
    list(loader(url, shuffle=1, on_bad="skip", max_bad=3).windows(0, 4))
    with pytest.raises(DataError, match=r"a.tar: 0002: .* more undecodable images than data.max_bad=2 allows"):
        list(loader(url, shuffle=1, on_bad="skip", max_bad=2).windows(0, 4))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nowhere/{000..000}.tar", "nowhere/000.tar: No such file or directory"),
        ("pipe:false", "the command ended with status 1"),
        ("pipe:echo https://u:word@host/a?sig=secret; exit 3", "the command ended with status 3"),
        ("pipe:true", "empty file"),
    ],
)
def test_a_stream_that_cannot_be_read(url: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        list(loader(url).windows(0, 1))
    assert str(caught.value).endswith(f": the stream cannot be read ({reason})")
    assert "word" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_torn_tar_is_named_without_objects(tmp_path: Path) -> None:
    url = Path(tar_of(tmp_path / "torn.tar", {"png": bytes(30_000), "cls": 1}))
    url.write_bytes(url.read_bytes()[:20_000])
    with pytest.raises(DataError) as caught:
        list(loader(str(url)).windows(0, 1))
    assert str(caught.value) == f"{url}: the stream cannot be read (unexpected end of data)"


def test_tars_without_samples_end_after_so_many_in_a_row(tmp_path: Path, urls: str) -> None:
    empty = tar_of(tmp_path / "empty.tar")
    with pytest.raises(DataError, match=r"empty.tar: 100 tars in a row hold no sample; "):
        list(loader(empty).windows(0, 1))
    # Some in between are no harm.
    [window] = loader(f"{{{empty},{urls.replace('{000000..000002}', '000000')}}}").windows(0, 1)
    assert window.num_valid == 16


def test_leaving_early_ends_a_command_that_stalls(urls: str) -> None:
    tar = shlex.quote(urls.replace("{000000..000002}", "000000"))
    windows = loader(f"pipe:head -c 200000 {tar}; sleep 40 | cat", shuffle=1, prefetch=1000).windows(0, 1000)
    next(windows)
    time.sleep(0.3)  # let it reach the stall
    start = time.monotonic()
    assert isinstance(windows, Generator)
    windows.close()
    assert time.monotonic() - start < 2
    assert not any(thread.name == "oat-stream" for thread in threading.enumerate())


RUN = """
import sys
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.plan import Layout
from oat_dist.data.stream import StreamBuilder, StreamLoader, StreamSet
url = sys.argv[1]
builder = StreamBuilder(StreamSet(url, ["a"], 100), ImagePipeline(8), None, "cls")
windows = StreamLoader(builder, url, Layout(16, 1), 0, seed=0).windows(0, 1)
print("ready", flush=True)
next(windows)
"""


def test_an_interrupt_ends_streams_that_give_nothing(tmp_path: Path) -> None:
    empty = tar_of(tmp_path / "empty.tar")
    # It is listed so often that going through three times as many would take minutes.
    streams = ["pipe:sleep 40", empty + "{,,,,,,,,,}" * 5]
    processes = [
        subprocess.Popen([sys.executable, "-c", RUN, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for url in streams
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        start = time.monotonic()
        for process in processes:
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        for process in processes:
            _, errors = process.communicate(timeout=20)  # ends when no child of it holds the error stream any more
            assert errors.rstrip().endswith("KeyboardInterrupt") and process.returncode == -signal.SIGINT
        assert time.monotonic() - start < 5  # about two seconds, on a machine with nothing else to do
    finally:
        for process in processes:
            process.kill()
