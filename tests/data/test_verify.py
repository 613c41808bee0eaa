"""verify: every kind of damage is found, all of it at once, and an undamaged set passes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from oat_dist.commands import verify
from oat_dist.data.index import open_split
from oat_dist.data.integrity.verify import verify_output
from oat_dist.data.packing import write_splits
from oat_dist.data.packing.samples import Sample
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes


def png(seed: int, size: tuple[int, int] = (9, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two splits, train of three shards with one image skipped in packing."""
    train = [Sample(f"{i:02d}", "ab"[i % 2], png(i)) for i in range(12)]
    splits = {"train": [*train, Sample("05 bad", "a", b"bad")], "val": train[:4]}
    write_splits(splits, tmp_path / "out", shard_samples=5, on_bad="skip")
    return tmp_path / "out"


def problems(out: Path, *, decode: bool = True) -> list[str]:
    return [f"{p.where}: {p.what}" for report in verify_output(out, decode=decode) for p in report.problems]


def vouch_for(folder: Path) -> None:
    """Make the manifest agree with sizes and digests of the files as they are now."""
    values = json.loads((folder / "manifest.json").read_text())
    for entry in (*values["shards"], values["index"]):
        data = (folder / entry.get("name", entry.get("file"))).read_bytes()
        entry["size"], entry["sha256"] = len(data), sha256_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(values))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def first_in_shard_0(folder: Path) -> tuple[int, int, str]:
    """(sample id, offset, key) of the first image of the first shard."""
    index = open_split(folder).index
    i = min(np.flatnonzero(index.shard == 0).tolist(), key=lambda i: int(index.offset[i]))
    return (
        i,
        int(index.offset[i]),
        (folder / "train-000000.tar").read_bytes()[int(index.offset[i]) - 512 :][:8].decode(),
    )


def test_undamaged_set_passes(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(out) == problems(out / "train") == problems(out, decode=False) == []
    assert verify.main([str(out)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["split", "images", "classes", "shards", "size", "copies", "problems"]
    assert [row[:4] + row[-1:] for row in rows[1:3]] == [["train", "12", "2", "3", "0"], ["val", "4", "2", "1", "0"]]
    assert text.endswith(f"{out}: all is well\n")


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path / "none")]) == 2
    assert f"error: {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert verify.main([str(tmp_path)]) == 2
    assert "holds no packed split; pack a data set first" in capsys.readouterr().err


def test_flipped_byte(out: Path) -> None:
    shard = out / "train/train-000000.tar"
    _, offset, _ = first_in_shard_0(out / "train")
    byte = shard.read_bytes()[offset + 60]
    patch(shard, offset + 60, bytes([byte ^ 1]))
    assert open_split(out / "train")  # sizes are as they were: only checksums find this
    found = problems(out, decode=False)
    assert len(found) == 1 and found[0].startswith("train/train-000000.tar: its bytes have changed (SHA-256")


def test_shard_cut_short(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = out / "train/train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"train-000001.tar: the shard has 4,000 bytes"):
        open_split(out / "train")
    found = problems(out)
    assert found[0].startswith("train/train-000001.tar: cut short: 4,000 bytes where the manifest says")
    assert sum("lies beyond the end of the shard" in line for line in found) >= 3
    assert all(line.startswith("train/train-000001.tar") for line in found)
    assert verify.main([str(out)]) == 1
    assert capsys.readouterr().out.endswith(f"{out}: damaged\n")


def test_missing_shard_and_foreign_tar(out: Path) -> None:
    (out / "train/train-000002.tar").rename(out / "train/train-000009.tar")
    assert problems(out) == [
        "train/train-000009.tar: not in the manifest, yet readers of *.tar would use it; remove it",
        "train/train-000002.tar: the shard is missing; restore it or pack again",
    ]


def test_swapped_index(out: Path) -> None:
    other = out.parent / "other"
    write_splits({"train": [Sample(f"{i:02d}", "ab"[i % 2], png(i)) for i in range(12)]}, other, seed=9)
    shutil.copy(other / "train/index.safetensors", out / "train")
    with pytest.raises(DataError, match="the index does not match"):
        open_split(out / "train")
    assert problems(out) == [
        "train/index.safetensors: does not match the manifest; restore both from one packing, or pack again"
    ]
    vouch_for(out / "train")  # even when the manifest vouches for it, the tars do not
    assert any("the index wants key" in line for line in problems(out, decode=False))
    (out / "train/index.safetensors").unlink()
    assert problems(out) == ["train/index.safetensors: the index is missing; restore it or pack again"]


def test_wrong_label_in_the_tar(out: Path) -> None:
    i, offset, key = first_in_shard_0(out / "train")
    label = open_split(out / "train").index.label[i]
    shard = out / "train/train-000000.tar"
    cls = shard.read_bytes().index(f"{key}.cls".encode()) + 512
    assert cls < offset and shard.read_bytes()[cls : cls + 1] == b"%d" % label
    patch(shard, cls, b"%d" % (1 - label))
    vouch_for(out / "train")
    name = open_split(out / "train").index.name(i)
    expected = f"train/train-000000.tar: {name!r}: {key}.cls says '{1 - label}', the index label {label}"
    assert problems(out) == [expected]


def test_wrong_label_in_the_index(out: Path) -> None:
    columns = load((out / "train/index.safetensors").read_bytes())
    columns["label"][3] = 5
    (out / "train/index.safetensors").write_bytes(save(columns))
    vouch_for(out / "train")
    found = problems(out)
    assert found[0] == "train/index.safetensors: '03': label 5 is out of range for 2 classes"
    assert any(".cls says '1', the index label 5" in line for line in found)
    columns["label"][3] = 0
    (out / "train/index.safetensors").write_bytes(save(columns))
    vouch_for(out / "train")
    assert any("class_counts: the manifest says [6, 6], the index [7, 5]" in line for line in problems(out))


def test_wrong_size_and_unreadable_image(out: Path) -> None:
    i, offset, _ = first_in_shard_0(out / "train")
    length = int(open_split(out / "train").index.length[i])
    shard = out / "train/train-000000.tar"
    patch(shard, offset, bytes(length))
    columns = load((out / "train/index.safetensors").read_bytes())
    j = next(j for j in range(12) if j != i)
    columns["width"][j] = 10
    (out / "train/index.safetensors").write_bytes(save(columns))
    vouch_for(out / "train")
    assert not any("unreadable" in line for line in problems(out, decode=False))
    found = problems(out)
    assert any("unreadable image (not an image of a known kind)" in line for line in found)
    assert any(f"'{j:02d}': is 9x8, in the index 10x8" in line for line in found)
    assert any("manifest.json: image_sizes: the manifest says" in line for line in found)


def test_tar_that_is_none(out: Path) -> None:
    shard = out / "train/train-000000.tar"
    shard.write_bytes(b"x" * shard.stat().st_size)
    found = problems(out, decode=False)
    assert "its bytes have changed" in found[0] and len(found) == 2
    assert found[1] == "train/train-000000.tar: not a tar; 5 samples were not checked"


def test_splits_of_different_classes(out: Path) -> None:
    write_splits({"test": [Sample("x", "a", png(1)), Sample("y", "c", png(2))]}, out)
    assert problems(out) == [
        "train/manifest.json: its classes are not those of split 'test'; pack all splits together",
        "val/manifest.json: its classes are not those of split 'test'; pack all splits together",
    ]


def test_manifest_damaged_or_missing(out: Path) -> None:
    text = (out / "train/manifest.json").read_text()
    (out / "train/manifest.json").write_text(text[:-20])
    (out / "val/manifest.json").unlink()
    found = problems(out)
    assert found[0].startswith("train/manifest.json: damaged manifest (") and len(found) == 2
    assert found[1] == "val/manifest.json: the manifest is missing; restore it or pack again"


def test_all_problems_are_found_at_once(out: Path) -> None:
    patch(out / "train/train-000000.tar", 600, b"\xff")
    (out / "train/train-000001.tar").unlink()
    (out / "val/index.safetensors").unlink()
    assert len(problems(out, decode=False)) >= 3
    assert {line.split(":")[0] for line in problems(out, decode=False)} == {
        "train/train-000000.tar",
        "train/train-000001.tar",
        "val/index.safetensors",
    }
