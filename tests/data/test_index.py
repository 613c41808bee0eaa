"""open_split: what does not belong together is refused with the file and the remedy."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from oat_dist.data import index as index_module
from oat_dist.data.index import Index, Manifest, ShardSet, open_split
from oat_dist.data.packing import write_shards
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes


def packed(folder: Path, *, seed: int = 0, count: int = 12) -> ShardSet:
    samples = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        samples.append((f"ä{i:02d}", i % 3, file.getvalue()))
    return write_shards(samples, folder, shard_samples=5, seed=seed)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def replace_index(folder: Path, data: bytes) -> None:
    """Put another index in place and its digest into the manifest, as a forger or a broken packer would."""
    (folder / "index.safetensors").write_bytes(data)
    edit_manifest(folder, lambda values: values["index"].update(size=len(data), sha256=sha256_bytes(data)))


def replace_column(folder: Path, name: str, values: np.ndarray) -> None:
    columns = load((folder / "index.safetensors").read_bytes())
    replace_index(folder, save({**columns, name: values}))


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        open_split(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_open_gives_what_was_packed(tmp_path: Path) -> None:
    shards = packed(tmp_path / "train")
    again = open_split(str(tmp_path / "train"))
    assert len(again) == again.num_samples == len(again.index) == 12 and again.classes == ["0", "1", "2"]
    assert again.digest == shards.digest == sha256_bytes((tmp_path / "train/manifest.json").read_bytes())
    assert [again.index.name(i) for i in (0, 5, 11)] == ["ä00", "ä05", "ä11"]
    shard = again.manifest.shards[int(again.index.shard[5])].name
    assert again.describe(5) == f"'ä05' (sample 5, in {tmp_path / 'train' / shard})"
    copy = Index.from_bytes(again.index.to_bytes(), tmp_path)
    for column in dataclasses.fields(Index):
        assert np.array_equal(getattr(copy, column.name), getattr(shards.index, column.name))


def test_digest_names_the_data(tmp_path: Path) -> None:
    digests = {packed(tmp_path / name / "train", seed=seed).digest for name, seed in (("a", 0), ("b", 0), ("c", 1))}
    assert len(digests) == 2


def test_missing_split_names_those_there(tmp_path: Path) -> None:
    assert "pack a data set first" in refusal(tmp_path / "train")
    packed(tmp_path / "test")
    assert refusal(tmp_path / "train") == f"{tmp_path / 'train'}: no such packed split; {tmp_path} holds test"
    assert "manifest.json is missing; pack it with shards/pack.py" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format": "oat-dist-shards", "version": 99}', '{"format": "oat-dist-shards"']
)
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    packed(tmp_path / "train")
    (tmp_path / "train/manifest.json").write_text(text)
    assert f"{tmp_path}/train/manifest.json: " in refusal(tmp_path / "train")


def test_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    packed(tmp_path / "train")
    edit_manifest(tmp_path / "train", lambda values: values["index"].update(file="../index.safetensors"))
    assert "'../index.safetensors' is not a plain file name" in refusal(tmp_path / "train")
    edit_manifest(tmp_path / "train", lambda values: values["index"].update(file="index.safetensors"))
    edit_manifest(tmp_path / "train", lambda values: values["shards"][0].update(name="/etc/hostname"))
    assert "'/etc/hostname' is not a plain file name" in refusal(tmp_path / "train")


def test_shard_cut_short_or_missing(tmp_path: Path) -> None:
    packed(tmp_path / "train")
    shard = tmp_path / "train/train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert refusal(tmp_path / "train").startswith(f"{shard}: the shard has {len(data) - 1:,} bytes, the manifest says")
    shard.unlink()
    assert refusal(tmp_path / "train") == f"{shard}: the shard is missing; restore it or pack again"


def test_index_missing_or_swapped(tmp_path: Path) -> None:
    packed(tmp_path / "a/train")
    packed(tmp_path / "b/train", seed=1)
    path = tmp_path / "a/train/index.safetensors"
    path.write_bytes((tmp_path / "b/train/index.safetensors").read_bytes())
    assert f"{path}: the index does not match {path.parent / 'manifest.json'}" in refusal(path.parent)
    path.unlink()
    assert refusal(path.parent) == f"{path}: the index is missing; pack the data set again"


def test_damaged_index(tmp_path: Path) -> None:
    index = packed(tmp_path / "train").index
    for name, values in (
        ("offset", index.offset[:-1]),
        ("offset", index.offset.astype(np.float64)),
        ("width", index.width[:, None]),
        ("name_ends", index.name_ends[::-1].copy()),
        ("name_ends", index.name_ends + np.uint64(1)),
        ("more", index.label),
    ):
        replace_column(tmp_path / "train", name, values)
        assert "index.safetensors: damaged index" in refusal(tmp_path / "train"), name
        replace_index(tmp_path / "train", index.to_bytes())
    replace_index(tmp_path / "train", b"no tensors")
    assert "index.safetensors: damaged index" in refusal(tmp_path / "train")


@pytest.mark.parametrize(("label", "message"), [(3, "label 3 is out of range for 3 classes"), (-1, "label -1 is out")])
def test_label_out_of_range(tmp_path: Path, label: int, message: str) -> None:
    labels = packed(tmp_path / "train").index.label.copy()
    labels[7] = label
    replace_column(tmp_path / "train", "label", labels)
    assert refusal(tmp_path / "train").startswith("'ä07' (sample 7, in ") and message in refusal(tmp_path / "train")


def test_index_that_points_outside_its_shards(tmp_path: Path) -> None:
    index = packed(tmp_path / "train").index
    replace_column(tmp_path / "train", "shard", index.shard + np.uint32(1))
    assert "names a shard that the manifest lacks" in refusal(tmp_path / "train")
    replace_index(tmp_path / "train", index.to_bytes())
    replace_column(tmp_path / "train", "offset", index.offset + np.uint64(10_000))
    assert "lies beyond the end of its shard; pack again" in refusal(tmp_path / "train")
    replace_index(tmp_path / "train", index.to_bytes())
    edit_manifest(tmp_path / "train", lambda values: values.update(num_samples=11))
    assert "the index lists 12 samples, the manifest 11" in refusal(tmp_path / "train")


# Large indexes are mapped.


def test_a_mapped_index_is_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = packed(tmp_path / "train")
    monkeypatch.setattr(index_module, "READ_LIMIT", 0)
    mapped = open_split(tmp_path / "train").index
    for column in dataclasses.fields(Index):
        values = getattr(mapped, column.name)
        assert np.array_equal(values, getattr(shards.index, column.name))
        assert not values.flags.writeable and not values.flags.owndata
    assert [mapped.name(i) for i in range(12)] == [f"ä{i:02d}" for i in range(12)]
    assert f"{tmp_path}/train/index.safetensors" in Path("/proc/self/maps").read_text()
    assert np.array_equal(Index.from_file(tmp_path / "train/index.safetensors").label, shards.index.label)


def test_what_is_checked_of_a_mapped_index_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size when it is opened, its rows where they are used; its checksum by verify."""
    index = packed(tmp_path / "train").index
    monkeypatch.setattr(index_module, "READ_LIMIT", 0)
    labels, offsets, numbers, ends = (getattr(index, name).copy() for name in ("label", "offset", "shard", "name_ends"))
    labels[3], offsets[4], numbers[5], ends[6] = 99, 2**64 - 1, 77, 0
    for name, values in (("label", labels), ("offset", offsets), ("shard", numbers), ("name_ends", ends)):
        replace_column(tmp_path / "train", name, values)
    shards = open_split(tmp_path / "train")
    reader = ShardReader(shards)
    assert len(reader.read(3)) == index.length[3]
    with pytest.raises(DataError, match=r"'ä04' \(sample 4, .*lies beyond the end of its shard; pack again"):
        reader.read(4)
    with pytest.raises(DataError, match=r"names a shard that the manifest lacks; pack again"):
        reader.read(5)
    assert "shard 77, which there is not" in shards.describe(5)
    assert shards.index.name(6) == "" and shards.index.name(8) == "ä08"
    path = tmp_path / "train/index.safetensors"
    with path.open("ab") as file:
        file.write(b"x")
    assert f"{path}: the index does not match" in refusal(tmp_path / "train")


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def small_index() -> Index:
    rows = {name: np.arange(5) for name in ("shard", "offset", "length", "label", "width", "height")}
    return Index.from_rows(rows, list("abcde"))


def change(place: str, value: object) -> Callable[[dict, bytes], bytes]:
    def apply(header: dict, body: bytes) -> bytes:
        column, _, key = place.partition(".")
        if value is None:
            del header[column]
        elif key:
            header[column][key] = value
        else:
            header[column] = value
        return with_header(header, body)

    return apply


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda header, body: b"", "no safetensors header"),
        (lambda header, body: b"1234567", "no safetensors header"),
        (lambda header, body: (2**63).to_bytes(8, "little") + body, "no safetensors header"),
        (lambda header, body: with_header(b"{", body), "its header is no JSON object"),
        (lambda header, body: with_header(b"[" * 100_000, body), "its header is no JSON object"),
        (lambda header, body: with_header(b"\xff\xfe", body), "its header is no JSON object"),
        (lambda header, body: with_header([], body), "its header is no JSON object"),
        (lambda header, body: with_header(header, body[:-1]), "column name_bytes does not fit its place"),
        (lambda header, body: with_header(header, body + b"x"), "751 bytes where its header says 750"),
        (change("label", None), "columns height, length, name_bytes, name_ends, offset, shard, width instead of"),
        (change("more", {}), "columns .*more.* instead of"),
        (change("label", 7), "column label has another type or shape"),
        (change("label.dtype", "I64"), "column label has another type or shape"),
        (change("label.dtype", "U32"), "column label is of the wrong type"),
        (change("label.dtype", ["I32"]), "column label has another type or shape"),
        (change("label.shape", [5, 1]), "column label has another type or shape"),
        (change("label.shape", []), "column label has another type or shape"),
        (change("label.shape", [-5]), "column label has no place"),
        (change("label.shape", [5.0]), "column label has no place"),
        (change("label.shape", [True]), "column label has no place"),
        (change("label.shape", [2**70]), "column label does not fit its place"),
        (change("label.data_offsets", [-20, 0]), "column label has no place"),
        (change("label.data_offsets", [20, 0]), "column label has no place"),
        (change("label.data_offsets", [10**6, 10**6 + 20]), "column label does not fit its place"),
        (change("label.data_offsets", [0, 20]), "its columns overlap or leave a gap"),
        (change("label.data_offsets", [0]), "column label has another type or shape"),
    ],
)
def test_a_damaged_header_is_named(damage: Callable[[dict, bytes], bytes], why: str) -> None:
    header, body = header_of(small_index().to_bytes())
    assert len(Index.from_bytes(with_header({**header, "__metadata__": {"a": "b"}}, body), "x")) == 5
    with pytest.raises(DataError, match=f"^i.safetensors: damaged index \\({why}.*\\); pack the data set again$"):
        Index.from_bytes(damage(header, body), "i.safetensors")


def test_whatever_is_flipped_is_an_error_or_what_the_library_reads() -> None:
    data = small_index().to_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(data)
        damaged[int(random.integers(0, len(data) - 100))] ^= 1 << int(random.integers(0, 8))
        try:
            index = Index.from_bytes(bytes(damaged), "x")
        except DataError:
            refused += 1
            continue
        theirs = load(bytes(damaged))
        for column in dataclasses.fields(Index):
            assert np.array_equal(getattr(index, column.name), theirs[column.name])
    assert 700 < refused < 1500


# The manifest.


def test_the_place_of_a_shard_is_said_only_where_it_is_elsewhere(tmp_path: Path) -> None:
    manifest = packed(tmp_path / "train").manifest
    assert '"url"' not in manifest.to_json()
    there = dataclasses.replace(manifest.shards[0], url="s3://bucket/x.tar")
    manifest = dataclasses.replace(manifest, shards=[there, *manifest.shards[1:]])
    assert Manifest.from_json(manifest.to_json(), "x") == manifest and manifest.to_json().count('"url"') == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"index": {"file": name}} for name in ("..", ".", "", "a\0b", "x" * 256, "é" * 128, 7, "\ud800")),
        *({"classes": value} for value in (None, "abc", ["0", "1", 2], ["0", "1", "1"])),
        *(
            {"class_counts": value}
            for value in (None, [4, 4], [4, 4, "4"], [4, 4, -4], [4, 4, 4, 0], "444", [4, 4, True])
        ),
        *({"num_samples": value} for value in ("12", 12.0, -12, None, True)),
        {"num_bytes": -1},
        *({"skipped": value} for value in (None, "x", [1], [{}], [{"name": 1, "reason": "x"}], {"name": "x"})),
        *({"image_sizes": value} for value in (None, [], {"min": 3}, {"min": [1]}, {"min": ["1", "2"]})),
        {"index": None},
        {"shards": None},
    ],
    ids=lambda changes: repr(changes)[:40],
)
def test_values_of_a_manifest_that_are_wrong(tmp_path: Path, changes: dict) -> None:
    packed(tmp_path / "train", count=3)

    def change(values: dict) -> None:
        for key, value in changes.items():
            values[key] = {**values[key], **value} if key == "index" and value else value

    edit_manifest(tmp_path / "train", change)
    assert refusal(tmp_path / "train").startswith(f"{tmp_path}/train/manifest.json: damaged manifest (")


def test_a_manifest_with_an_endless_number(tmp_path: Path) -> None:
    packed(tmp_path / "train", count=3)
    path = tmp_path / "train/manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', f'"seed": {"1" * 5000}'))
    assert refusal(tmp_path / "train").startswith(f"{path}: damaged manifest (Exceeds the limit")


def test_folders_in_place_of_files(tmp_path: Path) -> None:
    packed(tmp_path / "train", count=3)
    index, path = tmp_path / "train/index.safetensors", tmp_path / "train/manifest.json"
    index.unlink()
    index.mkdir()
    assert refusal(tmp_path / "train") == f"{index}: cannot be read (Is a directory); mend that or pack again"
    path.unlink()
    path.mkdir()
    assert refusal(tmp_path / "train") == f"{path}: cannot be read (Is a directory); mend that or pack again"


def test_a_shard_at_a_path_that_no_file_system_takes(tmp_path: Path) -> None:
    packed(tmp_path / "train", count=3)
    edit_manifest(tmp_path / "train", lambda values: values["shards"][0].update(url="x" * 300))
    assert "the shard cannot be opened (File name too long)" in refusal(tmp_path / "train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("url", url) for url in ("", "a\0b", "\ud800")),
        ("samples", -1),
        ("size", 2**70),
        ("name", "x" * 256),
        ("url", 7),
        ("size", -1),
        ("size", "9"),
        ("samples", "9"),
        ("sha256", "../../x"),
        ("sha256", None),
        ("name", 3),
    ],
)
def test_a_shard_that_the_manifest_describes_wrongly(tmp_path: Path, key: str, value: object) -> None:
    packed(tmp_path / "train")
    edit_manifest(tmp_path / "train", lambda values: values["shards"][0].update({key: value}))
    assert refusal(tmp_path / "train").startswith(f"{tmp_path}/train/manifest.json: damaged manifest (")
