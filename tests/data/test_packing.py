"""write_shards: what it writes, that it writes the same every time, and that nothing torn is left behind."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from packing_checks import contents, image, some_samples, visible
from PIL import Image

from oat_dist.data.packing import write_shards, write_splits
from oat_dist.data.packing.samples import Sample, seeded_order
from oat_dist.errors import DataError, OatError


def read_with_webdataset(folder: Path, *decode: str) -> dict[str, dict[str, Any]]:
    """All samples by key, as the plain library gives them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        dataset = webdataset.WebDataset(urls, shardshuffle=False)
        samples = {sample["__key__"]: sample for sample in (dataset.decode(*decode) if decode else dataset)}
        del dataset
        gc.collect()
    return samples


def test_index_gives_every_byte_and_label_back(tmp_path: Path) -> None:
    samples = some_samples()
    shards = write_shards(reversed(samples), tmp_path / "train", shard_samples=7)
    assert shards.classes == ["a", "b"] and shards.manifest.class_counts == [15, 15]
    assert [s.samples for s in shards.manifest.shards] == [7, 7, 7, 7, 2]
    expected = sorted(samples)
    for i, sample in enumerate(expected):
        shard = tmp_path / "train" / shards.manifest.shards[shards.index.shard[i]].name
        start = int(shards.index.offset[i])
        assert shard.read_bytes()[start : start + int(shards.index.length[i])] == sample.data
        assert shards.index.name(i) == sample.name
        assert "ab"[shards.index.label[i]] == sample.label
        assert (shards.index.width[i], shards.index.height[i]) == Image.open(io.BytesIO(sample.data)).size
    assert shards.manifest.num_bytes == sum(len(s.data) for s in samples)
    assert shards.manifest.image_sizes == {"min": [8, 9], "median": [10, 9], "max": [12, 9]}


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    samples = sorted(some_samples())
    write_shards(samples, tmp_path / "train", shard_samples=8)
    read = read_with_webdataset(tmp_path / "train")
    assert sorted(read) == [f"{i:08d}" for i in range(len(samples))]
    for i, sample in enumerate(samples):
        (kind,) = {"jpg", "png", "webp"} & set(read[f"{i:08d}"])  # by content: every name ends in .jpg
        assert kind == {0: "jpg", 1: "png", 2: "webp"}[int(sample.name[2:5]) % 3]
        assert read[f"{i:08d}"][kind] == sample.data
        assert read[f"{i:08d}"]["cls"] == str("ab".index(str(sample.label))).encode()


def test_webdataset_decodes_every_kind_we_write(tmp_path: Path) -> None:
    kinds = {
        "JPEG": "jpg",
        "PNG": "png",
        "GIF": "gif",
        "WEBP": "webp",
        "BMP": "bmp",
        "TIFF": "tif",
        "PPM": "ppm",
    }
    write_shards(
        ((f"{kind}-{label}", label, image(kind, seed=label)) for kind in kinds for label in (0, 1)),
        tmp_path / "train",
    )
    seen: Counter[str] = Counter()
    for sample in read_with_webdataset(tmp_path / "train", "pil").values():
        (kind,) = set(kinds.values()) & set(sample)
        assert sample[kind].size == (12, 8) and sample["cls"] in (0, 1)
        seen[kind] += 1
    assert seen == Counter(dict.fromkeys(kinds.values(), 2))


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    samples = some_samples()
    for place, workers, given in (("one", 1, samples), ("two", 5, samples[::-1])):
        write_shards(given, tmp_path / place / "train", shard_samples=9, workers=workers)
        time.sleep(1.1 if place == "one" else 0)  # a time stamp in seconds would show
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "two" / "train")
    write_shards(samples, tmp_path / "other" / "train", shard_samples=9, seed=1)
    assert contents(tmp_path / "other" / "train") != contents(tmp_path / "one" / "train")


def test_nothing_of_this_machine_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, data in enumerate((image(), image(seed=1), b"broken")):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(data)
    samples = [(f"{i}", i % 2, tmp_path / "in" / f"{i}.jpg") for i in range(4)]  # the last one is missing
    shards = write_shards(samples, tmp_path / "out" / "train", on_bad="skip")
    assert [bad["name"] for bad in shards.manifest.skipped] == ["2", "3"]
    for data in contents(tmp_path / "out" / "train").values():
        assert str(tmp_path).encode() not in data and b"0x" not in data


def test_order_in_the_shards_is_random_and_fixed_for_ever(tmp_path: Path) -> None:
    write_shards(some_samples(), tmp_path / "train")
    with tarfile.open(tmp_path / "train" / "train-000000.tar") as archive:
        keys = [int(name[:8]) for name in archive.getnames() if name.endswith(".cls")]
    assert sorted(keys) == list(range(30)) and keys != sorted(keys)
    assert keys == seeded_order([f"{i:08d}" for i in range(30)], 0)
    assert keys[:6] == [7, 14, 21, 11, 19, 22]  # any change here changes the bytes of every packed data set


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    samples = [Sample(f"{i:03d}", i % 2, image("BMP", seed=i, size=(40, 30 + i))) for i in range(24)]
    shards = write_shards(samples, tmp_path / "train", shard_bytes=30_720)
    sizes = [shard.size for shard in shards.manifest.shards]
    assert max(sizes) <= 30_720 and len(sizes) == 6 and sum(s.samples for s in shards.manifest.shards) == 24
    alone = write_shards(samples, tmp_path / "test", shard_bytes=1)
    assert [shard.samples for shard in alone.manifest.shards] == [1] * 24


def test_paths_and_callables_and_number_labels(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(image("PNG"))
    shards = write_shards(
        [("p", np.int64(1), tmp_path / "x.png"), ("c", 0, lambda: image(seed=3)), ("b", 2, image(seed=4))],
        tmp_path / "out" / "val",
    )
    assert shards.classes == ["0", "1", "2"] and shards.index.label.tolist() == [2, 0, 1]
    assert shards.manifest.split == "val" and shards.manifest.shards[0].name == "val-000000.tar"


A, B = image(seed=1), image(seed=2)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "split 'train' has no samples"),
        ([("x", 0, A), ("x", 1, B)], {}, "two samples are named 'x'; names must be unique"),
        (
            [("x", 0, A), ("y", 5, B)],
            {"classes": ["a", "b"]},
            "sample 'y': label 5 is out of range for 2 classes",
        ),
        ([("x", 0, A), ("y", -1, B)], {"classes": ["a", "b"]}, "sample 'y': label -1 is out of range"),
        ([("x", 0, A), ("y", 2, B)], {}, "empty class: '1' has no sample"),
        ([("x", "a", A)], {"classes": ["a", "b"]}, "empty class: 'b' has no sample; add images"),
        (
            [("x", "a", A), ("y", "beee", B)],
            {"classes": ["a", "bee"]},
            "unknown class 'beee'; did you mean 'bee'?",
        ),
        ([("x", "a", A), ("y", 1, B)], {}, "use one kind for all samples"),
        ([("x", 0.5, A), ("y", 1, B)], {"classes": ["a", "b"]}, "label 0.5 is no whole number"),
        ([("x", "a", A)], {"classes": ["a", "a"]}, "class 'a' is listed twice"),
        ([("x\n", "a", A)], {}, "holds unprintable characters; rename it"),
        ([("x", "a", A)], {"split": "my train"}, "split name 'my train': use letters"),
        ([("x", "a", A)], {"shard_samples": 0}, "shard_samples is 0; it must be at least 1"),
        ([("x", "a", A)], {"on_bad": "ignore"}, 'on_bad is \'ignore\'; it must be "stop" or "skip"'),
        (
            [("x", "a", 7)],
            {},
            "sample 'x': unreadable image (the data is of type int; give bytes, a path",
        ),
        ([("x", "a", "no/such.jpg")], {}, "no/such.jpg: unreadable image (No such file or directory)"),
        ([("x", "a", "no\0such.jpg")], {}, "unreadable image (the path holds a NUL byte)"),
        ([("x", "a", A)], {"workers": 0}, "workers is 0; it must be at least 1"),
    ],
)
def test_bad_samples_are_refused_and_nothing_is_written(tmp_path: Path, samples, options, message: str) -> None:
    with pytest.raises(DataError) as error:
        write_shards(samples, tmp_path / "out" / "train", **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert visible(tmp_path / "out") == []


def bad_images() -> dict[str, tuple[bytes, str]]:
    whole = image(size=(200, 200))
    bomb = bytearray(whole)
    start = bomb.index(b"\xff\xc0") + 5
    bomb[start : start + 4] = b"\xff\xff\xff\xff"  # a header that claims 65535 x 65535 pixels
    return {
        "cut JPEG": (whole[: len(whole) // 2], "truncated"),
        "cut progressive JPEG": (image(size=(200, 200), progressive=True)[:-3000], "truncated"),
        "cut PNG": (image("PNG", size=(200, 200))[:-3000], ""),
        "text": (b"<html>not found</html>", "not an image of a known kind"),
        "empty": (b"", "the file is empty"),
        "bomb": (bytes(bomb), "decompression bombs"),
    }


@pytest.mark.parametrize("kind", list(bad_images()))
def test_unreadable_image_stops_or_is_skipped_and_listed(tmp_path: Path, kind: str) -> None:
    data, reason = bad_images()[kind]
    (tmp_path / "bad.jpg").write_bytes(data)
    samples = [*some_samples(), Sample("a/bad.jpg", "a", tmp_path / "bad.jpg")]
    with pytest.raises(DataError) as error:
        write_shards(samples, tmp_path / "out" / "train")
    assert str(error.value).startswith(f"{tmp_path / 'bad.jpg'}: unreadable image (")
    assert reason in str(error.value) and "--on-bad skip" in str(error.value) and "\n" not in str(error.value)
    assert visible(tmp_path / "out") == []

    shards = write_shards(samples, tmp_path / "out" / "train", on_bad="skip")
    assert len(shards) == 30 and [bad["name"] for bad in shards.manifest.skipped] == ["a/bad.jpg"]
    assert reason in shards.manifest.skipped[0]["reason"]
    # the skipped image has used up its key: a/bad.jpg is the 16th name
    assert sorted(read_with_webdataset(tmp_path / "out" / "train")) == [f"{i:08d}" for i in range(31) if i != 15]


def test_skipping_never_empties_a_class(tmp_path: Path) -> None:
    samples = [Sample("x", "a", A), Sample("y", "b", b"broken"), Sample("z", "b", b"")]
    with pytest.raises(DataError, match=r"empty class: 'b' has no readable image.*; 1 finished shard kept"):
        write_shards(samples, tmp_path / "out" / "train", on_bad="skip")
    assert visible(tmp_path / "out") == [".packing-train"]


def test_odd_but_whole_images_are_taken(tmp_path: Path) -> None:
    cmyk = io.BytesIO()
    Image.new("CMYK", (9, 7), (1, 2, 3, 4)).save(cmyk, "JPEG")
    grey = io.BytesIO()
    Image.new("L", (9, 7), 5).save(grey, "JPEG")
    odd = {"cmyk": cmyk.getvalue(), "grey": grey.getvalue(), "trailing bytes": image(size=(9, 7)) + b"xyz"}
    shards = write_shards([(name, k, data) for k, (name, data) in enumerate(odd.items())], tmp_path / "train")
    assert shards.index.width.tolist() == [9, 9, 9] and shards.index.height.tolist() == [7, 7, 7]


def test_one_bad_split_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 'n': unreadable image"):
        write_splits({"train": some_samples(), "val": [*some_samples(4), Sample("n", "a", b"no")]}, tmp_path / "out")
    assert set(visible(tmp_path / "out")) <= {".packing-train"}  # what is finished waits there, and only there
    packed = write_splits({"train": some_samples(), "val": some_samples(4)}, tmp_path / "out")
    assert visible(tmp_path / "out") == ["train", "val"] and [len(s) for s in packed.values()] == [30, 4]


def test_existing_split_is_kept_unless_overwritten(tmp_path: Path) -> None:
    write_shards(some_samples(), tmp_path / "train")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"train: already exists; choose another folder, or replace it: --overwrite"):
        write_shards(some_samples(6), tmp_path / "train")
    with pytest.raises(DataError, match="unreadable image"):  # a failing replacement keeps the old one too
        write_shards([("x", "a", b"no")], tmp_path / "train", overwrite=True)
    assert contents(tmp_path) == before
    assert len(write_shards(some_samples(6), tmp_path / "train", overwrite=True)) == 6
    assert visible(tmp_path) == ["train"] and len(list((tmp_path / "train").iterdir())) == 3


@pytest.mark.parametrize("name", ["cat/1.jpg", "notes.txt"])
def test_overwrite_replaces_nothing_but_a_packed_split(tmp_path: Path, name: str) -> None:
    (tmp_path / "train" / name).parent.mkdir(parents=True)
    (tmp_path / "train" / name).write_bytes(A)
    with pytest.raises(DataError, match="will not be replaced, it holds"):
        write_shards(some_samples(), tmp_path / "train", overwrite=True)
    assert (tmp_path / "train" / name).read_bytes() == A


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OatError, match=r"file: cannot .*\(File exists\)"):
        write_shards(some_samples(), tmp_path / "file" / "train")


def test_manifest_has_no_time(tmp_path: Path) -> None:
    write_shards(some_samples(), tmp_path / "train", source="mine", seed=4)
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert set(manifest) == {
        *(
            "format",
            "version",
            "split",
            "source",
            "seed",
            "classes",
            "class_counts",
            "num_samples",
            "num_bytes",
        ),
        *("image_sizes", "shards", "index", "skipped"),
    }
    assert (manifest["source"], manifest["seed"]) == ("mine", 4)
