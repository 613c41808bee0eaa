"""CIFAR-10 as published: pickles that are not run, binary files, archives that are not unpacked; every bad input."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES, PackPlan
from oat_dist.data.sources.plain_pickle import read_plain_pickle
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
COUNT = 12


def records(batch: str, count: int = COUNT) -> tuple[np.ndarray, list[int]]:
    """(count, 3072) uint8 and labels, each class among them."""
    random = np.random.default_rng(BATCHES.index(batch))
    labels = (np.arange(count) * 3 % 10).tolist()
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def python2_pickle(value: object) -> bytes:
    """Protocol 2 with the instructions of Python 2's cPickle and NumPy 1, of which the published files consist."""
    memo = iter(range(1, 1 << 30))

    def put() -> bytes:
        number = next(memo)
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def text(data: bytes) -> bytes:
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data

    def write(value: object) -> Iterator[bytes]:
        if isinstance(value, dict):
            yield b"}" + put() + b"("
            for key, item in value.items():
                yield from write(key)
                yield from write(item)
            yield b"u"
        elif isinstance(value, list):
            yield b"]" + put()
            for start in range(0, len(value), 1000):
                yield b"("
                for item in value[start : start + 1000]:
                    yield from write(item)
                yield b"e"
        elif isinstance(value, bytes):
            yield text(value) + put()
        elif isinstance(value, np.ndarray):
            assert value.dtype == np.uint8
            yield b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
            yield b"K\x00\x85" + put() + text(b"b") + put() + b"\x87" + put() + b"R" + put()
            yield b"(K\x01" + b"".join(b"M" + struct.pack("<H", size) for size in value.shape) + b"\x86" + put()
            yield b"cnumpy\ndtype\n" + put() + text(b"u1") + put() + b"K\x00K\x01\x87" + put() + b"R" + put()
            yield b"(K\x03" + text(b"|") + put() + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + put() + b"b"
            yield b"\x89" + text(value.tobytes()) + put() + b"t" + put() + b"b"
        else:
            assert isinstance(value, int) and 0 <= value < 256
            yield b"K" + bytes([value])

    return b"\x80\x02" + b"".join(write(value)) + b"."


def batch_content(batch: str, count: int = COUNT) -> dict[Any, Any]:
    images, labels = records(batch, count)
    names = [f"{CLASSES[label]}_s_{i:06d}.png".encode() for i, label in enumerate(labels)]
    return {b"batch_label": batch.encode(), b"labels": labels, b"data": images, b"filenames": names}


def meta_content() -> dict[bytes, Any]:
    return {b"num_cases_per_batch": 200, b"label_names": [name.encode() for name in CLASSES], b"num_vis": 255}


def python_files(dump: Callable[[Any], bytes] = python2_pickle) -> dict[str, bytes]:
    return {"batches.meta": dump(meta_content()), **{batch: dump(batch_content(batch)) for batch in BATCHES}}


def binary_files() -> dict[str, bytes]:
    files = {"batches.meta.txt": "\n".join([*CLASSES, "", ""]).encode()}
    for batch in BATCHES:
        images, labels = records(batch)
        files[f"{batch}.bin"] = np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1).tobytes()
    return files


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def plan(path: Path, **splits: None) -> PackPlan:
    return SOURCES["cifar10"](str(path), splits=splits, seed=0)


def everything(plan: PackPlan) -> object:
    return plan.classes, {
        split: [(s.name, s.label, s.data() if callable(s.data) else s.data) for s in samples]
        for split, samples in plan.splits.items()
    }


def test_our_pickles_are_like_the_published_ones() -> None:
    content = batch_content("test_batch")
    assert python2_pickle(content).startswith(b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U")
    read = pickle.loads(python2_pickle(content), encoding="bytes")
    assert np.array_equal(read.pop(b"data"), content.pop(b"data")) and read == content


def test_every_form_gives_the_same_images(tmp_path: Path) -> None:
    python = put(tmp_path / "one/cifar-10-batches-py", python_files())
    binary = put(tmp_path / "two/cifar-10-batches-bin", binary_files())
    archives = [
        archive(tmp_path / "p.tar.gz", {f"cifar-10-batches-py/{name}": data for name, data in python_files().items()}),
        archive(tmp_path / "b.tar.gz", {f"cifar-10-batches-bin/{name}": data for name, data in binary_files().items()}),
    ]
    modern = [
        put(tmp_path / f"protocol {protocol}", python_files(lambda value, p=protocol: pickle.dumps(value, p)))
        for protocol in (2, 3, 4, 5)
    ]
    expected = everything(plan(python))
    for path in (python.parent, binary, binary.parent, *archives, *modern):
        assert everything(plan(path)) == expected, path
        assert plan(path).source == "cifar10"
    found = plan(python)
    assert found.classes == CLASSES and list(found.splits) == ["train", "test"]
    assert [s.name for s in found.splits["train"]][COUNT - 1 : COUNT + 1] == [
        f"data_batch_1/{COUNT - 1:05d}.png",
        "data_batch_2/00000.png",
    ]
    assert found.notes == [
        "not of 10,000 images as published: data_batch_1 (12), data_batch_2 (12), data_batch_3 (12), "
        "data_batch_4 (12), data_batch_5 (12) and 1 more"
    ]
    assert list(plan(python, test=None).splits) == ["test"]


def test_packed_pixels_are_the_published_ones(tmp_path: Path) -> None:
    found = plan(put(tmp_path / "in", binary_files()))
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, source=found.source)
    for split, batches in (("train", BATCHES[:5]), ("test", BATCHES[5:])):
        shards = packed[split]
        assert len(shards) == COUNT * len(batches)
        images, labels = zip(*(records(batch) for batch in batches), strict=True)
        with contextlib.closing(ShardReader(shards)) as reader:
            for i in range(len(shards)):
                batch, position = divmod(i, COUNT)
                red_green_blue = images[batch][position].reshape(3, 32, 32)
                pixels = decode_rgb(reader.read(i))
                assert np.array_equal(pixels, np.stack(list(red_green_blue), axis=-1))
                assert shards.classes[shards.index.label[i]] == CLASSES[labels[batch][position]]


def test_only_the_batches_of_the_wanted_split_are_needed(tmp_path: Path) -> None:
    folder = put(tmp_path, {"test_batch": python2_pickle(batch_content("test_batch", 10_000))})
    found = plan(folder, test=None)
    assert len(found.splits["test"]) == 10_000 and found.classes == CLASSES
    assert found.notes == [
        "no batches.meta there; took the published class names",
        "not the published files, by their MD5: test_batch",
    ]


def test_a_folder_of_images_is_a_folder_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "1.jpg")
    found = plan(tmp_path)
    assert found.source == "cifar10" and found.classes == sorted(CLASSES)
    assert [s.name for s in found.splits["test"]] == [f"test/{name}/1.jpg" for name in sorted(CLASSES)]


def test_folders_of_other_classes_are_not_cifar10(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    with pytest.raises(DataError, match="nor folders of its ten classes, but cat, dog; use the source imagefolder"):
        plan(tmp_path)


# Pickles that would do something.


class Touch:
    """Unpickled by Python itself, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3"])
def test_a_pickle_that_runs_a_program_is_refused_and_does_nothing(tmp_path: Path, name: str, protocol: int) -> None:
    harm = tmp_path / "harm"
    data = pickle.dumps({**batch_content("data_batch_3"), b"label_names": Touch(harm)}, protocol)
    for path in (
        put(tmp_path / "folder", {**python_files(), name: data}),
        archive(tmp_path / "x.tar.gz", {**python_files(), name: data}),
    ):
        with pytest.raises(DataError) as error:
            plan(path)
        place = path / name if path.is_dir() else f"{path}: {name}"
        text = str(error.value)
        assert text.startswith(f"{place}: ") and "nothing was run. Fetch the published archive" in text
        # the older protocols begin with instructions that no published file has
        assert ("asks for 'posix.system', but only plain data" if protocol >= 2 else "holds the instruction") in text
        assert "\n" not in text and not harm.exists()
    pickle.loads(data)  # the file is as harmful as it should be
    assert harm.exists()


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"cposix\nsystem\n.", "asks for 'posix.system'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "asks for 'posix.system'"),
        (b"(S'ls'\niposix\nsystem\n.", "holds the instruction STRING"),
        (b"\x80\x02U\x02ls(iposix\nsystem\n.", "holds the instruction INST"),
        (b"\x80\x02(cnumpy\nndarray\nK\x01o.", "holds the instruction OBJ"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "holds the instruction NEWOBJ"),
        (b"\x80\x02U\x01xQ.", "holds the instruction BINPERSID"),
        (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "calls 'numpy.ndarray' in a way of its own"),
        (b"\x80\x02}}b.", "fills an object of its own"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "asks for 'numpy.core.multiarray.scalar'"),
        (pickle.dumps(np.zeros(3), 2), "holds an array of type 'f8'"),
        (pickle.dumps(np.array([None]), 2), "fills an object of its own"),
    ],
)
def test_instructions_that_are_not_followed(data: bytes, fault: str) -> None:
    with pytest.raises(DataError) as error:
        read_plain_pickle(data, "file")
    assert str(error.value).startswith(f"file: {fault}, but only plain data is read from a pickle")


def test_plain_pickles_are_read_as_python_reads_them() -> None:
    value = {
        "a": [1, -70_000, 2**40, 2.5, None, True, (), (1, 2, "ü"), {"b": b"\xff"}, bytearray(b"x")],
        "rows": np.arange(6, dtype=np.int64).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        "long": ["x" * 300] * 2 + list(range(2000)),
    }
    for protocol in (2, 3, 4, 5):
        if protocol < 5:
            value["a"] = value["a"][:-1]  # a bytearray is plain from protocol 5 on
        read = read_plain_pickle(pickle.dumps(value, protocol), "file")
        for name in ("rows", "columns"):
            assert np.array_equal(read[name], value[name])
        assert read["a"] == value["a"] and read["long"] == value["long"]


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
@example(b"", 55, 92)  # a backslash in a text
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_value_or_one_clear_error(junk: bytes, position: int, byte: int) -> None:
    whole = bytearray(python2_pickle({b"labels": [1, 2, 3], b"data": np.zeros((2, 40), np.uint8)}))
    whole[position % len(whole)] = byte
    for data in (junk, b"\x80\x02" + junk, bytes(whole), bytes(whole[:position])):
        try:
            read_plain_pickle(data, "file")
        except DataError as error:
            assert str(error).startswith("file: ")


# Archives and folders that cannot be used.


def test_names_in_an_archive_never_become_paths(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    files = python_files()
    members = {f"../{name}": data for name, data in files.items() if name != "test_batch"}
    path = archive(tmp_path / "below/x.tar.gz", {**members, str(tmp_path / "test_batch"): files["test_batch"]})
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert len(plan(path).splits["train"]) == 5 * COUNT
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="holds no batches of CIFAR-10"):
        plan(path)


def changed(**changes: object) -> bytes:
    return python2_pickle({**batch_content("data_batch_2"), **{key.encode(): value for key, value in changes.items()}})


FOLDERS: list[tuple[str, bytes | None, str]] = [
    ("data_batch_2", changed()[:-3000], "not a whole pickle; the file is damaged or cut short: fetch it again"),
    ("data_batch_2", b"", "not a whole pickle; the file is damaged or cut short: fetch it again"),
    ("data_batch_2", python2_pickle([1]), "holds no dictionary; this is no file of CIFAR-10"),
    ("data_batch_2", changed(labels=[1, 2]), "12 images but 2 labels; fetch the published archive"),
    ("data_batch_2", changed(labels=[10] * COUNT), "image 0 has the label 10, out of range for 10 classes (0 to 9)"),
    ("data_batch_2", changed(labels=b"x"), "its 'labels' are no list of whole numbers; fetch the published"),
    ("data_batch_2", changed(labels=[b"x"] * COUNT), "its 'labels' are no list of whole numbers"),
    (
        "data_batch_2",
        changed(data=np.zeros((COUNT, 784), np.uint8)),
        "its 'data' is no array of 32x32 images (n, 3072)",
    ),
    ("data_batch_2", changed(data=b"x"), "its 'data' is no array of 32x32 images (n, 3072)"),
    ("batches.meta", python2_pickle({}), "has no list 'label_names'; fetch the published archive"),
    ("data_batch_2", None, "lacks data_batch_2; fetch the published archive again"),
]


@pytest.mark.parametrize(("name", "data", "message"), FOLDERS)
def test_bad_pickles(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    files = {**python_files(), name: data}
    put(tmp_path, {key: value for key, value in files.items() if value is not None})
    with pytest.raises(DataError) as error:
        plan(tmp_path)
    place = tmp_path / name if data is not None else tmp_path
    assert str(error.value).startswith(f"{place}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "data_batch_4.bin",
            bytes(3073 * 3 - 1),
            "9,218 bytes are not a whole number of images of 3,073 bytes; the file",
        ),
        ("data_batch_4.bin", b"", "0 bytes are not a whole number of images"),
        (
            "test_batch.bin",
            bytes(3073) + b"\x0a" + bytes(3072),
            "image 1 has the label 10, out of range for 10 classes",
        ),
        ("batches.meta.txt", b"\n\n", "is no list of class names; fetch the published archive"),
        ("batches.meta.txt", b"\xff\xfe", "is no list of class names"),
    ],
)
def test_bad_binary_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    put(tmp_path, {**binary_files(), name: data})
    with pytest.raises(DataError) as error:
        plan(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: {message}")


def test_inputs_that_hold_no_cifar10(tmp_path: Path) -> None:
    def refusal(path: Path, **splits: Any) -> str:
        with pytest.raises(DataError) as error:
            SOURCES["cifar10"](str(path), splits=splits, seed=0)
        return str(error.value).replace(str(path), "INPUT")

    assert refusal(tmp_path / "nowhere") == "INPUT: no such folder or archive; check the path"
    assert refusal(tmp_path) == (
        "INPUT: holds no class folder; put the images of each class into a folder named after it"
    )
    (tmp_path / "x.tar.gz").write_bytes(b"no archive" * 100)
    assert refusal(tmp_path / "x.tar.gz").startswith("INPUT: not a whole tar archive (")
    images = archive(tmp_path / "jpg.tar.gz", {"train/cat/1.jpg": b"", "train/dog/1.jpg": b""})
    assert refusal(images) == (
        "INPUT: holds no batches of CIFAR-10 such as data_batch_1; an archive of images must be unpacked first"
    )
    whole = archive(tmp_path / "whole.tar.gz", python_files()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.tar.gz").startswith("INPUT: not a whole tar archive (")
    twice = archive(tmp_path / "two.tar.gz", {f"{place}/data_batch_1": b"" for place in "ab"})
    assert refusal(twice) == "INPUT: holds two files 'data_batch_1'; fetch the published archive"
    folder = put(tmp_path / "split", python_files())
    assert (
        refusal(folder, train=1)
        == "INPUT: is split already (train, test); leave the shares out of --split, or use --hold-out"
    )
    assert refusal(folder, val=None) == "INPUT: has no split 'val'; it has train, test"


def test_published_digests_are_those_that_torchvision_knows() -> None:
    from torchvision.datasets import CIFAR10

    from oat_dist.data.sources.cifar10 import _PUBLISHED_MD5

    assert dict(map(tuple, [*CIFAR10.train_list, *CIFAR10.test_list])) == _PUBLISHED_MD5
    assert all(len(bytes.fromhex(digest)) == hashlib.md5().digest_size for digest in _PUBLISHED_MD5.values())
