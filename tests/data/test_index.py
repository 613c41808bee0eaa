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

from oat_dist.data.index import Index, ShardSet, open_split
from oat_dist.data.packing import write_shards
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
    assert "a sample lies beyond the end of its shard" in refusal(tmp_path / "train")
    replace_index(tmp_path / "train", index.to_bytes())
    edit_manifest(tmp_path / "train", lambda values: values.update(num_samples=11))
    assert "the index lists 12 samples, the manifest 11" in refusal(tmp_path / "train")
