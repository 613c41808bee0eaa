"""Streaming: real tars through webdataset, on ranks that never run out, and every bad sample named."""

from __future__ import annotations

import io
import shlex
import threading
from collections.abc import Iterator
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
        ({"png": b"", "txt": "a"}, {}, r"0000: no label under data.stream.label_key=cls \(KeyError\('cls'\)\); labels"),
        ({"png": b"", "cls": b"cat"}, {}, "no label under data.stream.label_key=cls .*invalid literal"),
        ({"png": b"", "json": {"a": 1}}, {"label_key": "json:b"}, r"label_key=json:b \(KeyError\('b'\)\)"),
        (
            {"png": b"", "cls": 10},
            {},
            "label 10 is out of range for 10 classes; mend the labels or data.stream",
        ),
        ({"png": b"no", "cls": 1}, {}, "0000: not an image of a known kind; this image cannot be decoded: mend it, or"),
        ({"png": b"no", "cls": 1}, {"on_bad": "skip", "max_bad": 3}, "more undecodable images than data.max_bad=3"),
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
    assert len(load.builder.bad) == 2 and all("a.tar: 0003" in reason for reason in load.builder.bad.values())


@pytest.mark.parametrize("url", ["nowhere/{000..002}.tar", "pipe:false"])
def test_a_stream_that_cannot_be_read(url: str) -> None:
    with pytest.raises(DataError, match="the stream cannot be read"):
        list(loader(url).windows(0, 1))
