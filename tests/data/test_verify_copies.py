"""verify on copies and leakage, and on splits that were indexed rather than packed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import picture, shard_writer, write_tar
from PIL import Image
from shard_server import ShardServer
from test_verify import patch, png, problems, vouch_for

from oat_dist.commands import verify
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.write_index import index_shards
from oat_dist.data.index import open_split
from oat_dist.data.integrity.leakage import Hashes, Overlap, between, within
from oat_dist.data.integrity.verify import verify_output
from oat_dist.data.packing import write_splits
from oat_dist.data.packing.samples import Sample
from oat_dist.errors import DataError

Capture = pytest.CaptureFixture[str]


def again(data: bytes, kind: str = "PNG", **options: object) -> bytes:
    """The same pixels in another file."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, kind, **options)
    assert file.getvalue() != data
    return file.getvalue()


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Copies within train (b of a, e of d with another label) and of train in test, as files and as pixels."""
    images = {name: png(k) for k, name in enumerate("acdfgh")}
    images["b"], images["e"] = images["a"], again(images["d"], compress_level=0)
    labels = dict(zip("abcdefgh", "xxyxyxyy", strict=True))
    train = [Sample(name, labels[name], images[name]) for name in sorted(images)]
    test = [
        Sample("1", "x", images["a"]),
        Sample("2", "x", again(images["c"], "BMP")),
        Sample("3", "y", png(77)),
        Sample("4", "x", png(78, (8, 9))),
    ]
    write_splits({"train": train, "test": test}, tmp_path / "set", shard_samples=3)
    return tmp_path / "set"


def test_copies_and_leakage(leaky: Path, capsys: Capture) -> None:
    test, train = verify_output(leaky)
    assert (test.name, train.name, test.problems, train.problems) == ("test", "train", [], [])
    assert train.copies == Overlap(count=2, same_file=1, other_label=1, examples=[(0, 1), (3, 4)])
    assert train.copy_examples == [("a", "b"), ("d", "e")] and train.leaks == []
    assert test.copies is not None and test.copies.count == 0
    (leak,) = test.leaks
    assert (leak.other, leak.examples) == ("train", [("a", "1"), ("c", "2")])
    assert (leak.overlap.count, leak.overlap.same_file, leak.overlap.other_label) == (2, 1, 1)

    assert verify.main([str(leaky)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[3:] == [
        "copies within a split:",
        "  train: 2 images are copies of another one: 1 the same file, 1 the same pixels in another file, "
        "1 under another class",
        "    'b' is 'a' again",
        "    'e' is 'd' again",
        "leakage between splits:",
        "  test: 2 images are also in train (50 % of test): 1 the same file, 1 the same pixels in another file, "
        "1 under another class",
        "    '1' is 'a' of train",
        "    '2' is 'c' of train",
        f"{leaky}: all is well",
    ]
    assert verify.main([str(leaky), "--strict"]) == 1
    assert capsys.readouterr().out.endswith(f"{leaky}: whole, but images of one split are in another\n")
    assert verify.main([str(leaky / "test"), "--strict"]) == 0
    assert "leakage between" not in capsys.readouterr().out


def test_without_decoding_only_equal_files_are_copies(leaky: Path, capsys: Capture) -> None:
    test, train = verify_output(leaky, decode=False)
    assert train.copies is not None and train.copies.count == train.copies.same_file == 1
    assert [(leak.overlap.count, leak.examples) for leak in test.leaks] == [(1, [("a", "1")])]
    assert verify.main([str(leaky), "--no-decode", "--strict"]) == 1
    assert capsys.readouterr().out.endswith("in another (images not decoded)\n")


def test_no_leakage_is_said_too(tmp_path: Path, capsys: Capture) -> None:
    splits = {name: [Sample(str(k), "xy"[k % 2], png(100 * i + k)) for k in range(4)] for i, name in enumerate("ab")}
    write_splits(splits, tmp_path / "set")
    assert verify.main([str(tmp_path / "set"), "--strict"]) == 0
    assert capsys.readouterr().out.endswith(f"leakage between splits: none\n{tmp_path}/set: all is well\n")


def test_pixels_in_another_shape_are_another_image(tmp_path: Path) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (2, 8)).save(flat, "PNG")
    square = io.BytesIO()
    Image.new("RGB", (4, 4)).save(square, "PNG")
    write_splits({"s": [Sample("a", "x", flat.getvalue()), Sample("b", "x", square.getvalue())]}, tmp_path)
    assert [report.copies.count for report in verify_output(tmp_path) if report.copies] == [0]


def test_the_search_for_copies_against_a_dictionary() -> None:
    random = np.random.default_rng(0)
    for count in (0, 1, 50, 400):
        image = random.integers(0, 6, (count, 2)).astype(np.uint64) << np.uint64(62)  # many equal, in one half or both
        crc, label = random.integers(0, 2, count).astype(np.uint32), random.integers(0, 3, count)
        split = Hashes(image, crc, label)
        first: dict[tuple[int, int], int] = {}
        expected = []
        for i, key in enumerate(map(tuple, image.tolist())):
            if key != (0, 0):
                if key in first:
                    expected.append((first[key], i))
                else:
                    first[key] = i
        found = within(split)
        assert (found.count, found.examples) == (len(expected), expected[:5])
        assert found.same_file == sum(crc[a] == crc[b] for a, b in expected)
        assert found.other_label == sum(label[a] != label[b] for a, b in expected)
        half = count // 2
        one, other = (Hashes(*(column[part] for column in split)) for part in (slice(half), slice(half, None)))
        leaks = [(a, b - half) for b in range(half, count) if (a := first.get(tuple(image[b].tolist()), count)) < half]
        assert (between(one, other).count, between(one, other).examples) == (len(leaks), leaks[:5])


def test_forked_processes_find_what_threads_find(leaky: Path) -> None:
    patch(leaky / "train/train-000001.tar", 600, b"\xff")
    expected = [(r.name, r.problems, r.copies, r.leaks) for r in verify_output(leaky, workers=2)]
    assert expected[1][1]
    code = (
        "from oat_dist.data.workers import can_fork\n"
        "from oat_dist.data.integrity.verify import verify_output\nassert can_fork()\n"
        f"print([(r.name, r.problems, r.copies, r.leaks) for r in verify_output({str(leaky)!r}, workers=2)])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n"


def test_only_so_many_problems_of_a_shard_are_listed(tmp_path: Path) -> None:
    image = png(0)
    write_splits({"s": [Sample(f"{k:04d}", "x", image) for k in range(1005)]}, tmp_path)
    folder = tmp_path / "s"
    index = open_split(folder).index
    data = bytearray((folder / "s-000000.tar").read_bytes())
    for offset in index.offset.tolist():
        data[offset : offset + 4] = b"none"
    (folder / "s-000000.tar").write_bytes(bytes(data))
    vouch_for(folder)
    found = problems(tmp_path)
    assert len(found) == 1001 and found[-1] == "s/s-000000.tar: ... and 5 more problems in this shard"
    assert found[0].endswith(": unreadable image (not an image of a known kind)")


# Splits that were indexed.


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    shard_writer(tmp_path / "shards", count=9, each=5)
    index_shards([tmp_path / "shards"], tmp_path / "set", rules=Rules.parse(None, "json:label"))
    return tmp_path


def test_damage_of_foreign_shards(foreign: Path) -> None:
    tar = foreign / "shards/s-000000.tar"
    content = tar.read_bytes()
    assert problems(foreign / "set") == []
    place = content.index(b"kind 2") + 5
    patch(tar, place, b"1")
    assert problems(foreign / "set", decode=False) == [
        "train/s-000000.tar: its bytes have changed (SHA-256 differs from the manifest); restore it or index the "
        "shards again",
        "train/s-000000.tar: 's-000000/part/00002': s-000000/part/00002.json says 'kind 1', the index label 2",
    ]
    tar.write_bytes(content[:9000])
    found = problems(foreign / "set")
    assert found[0].startswith("train/s-000000.tar: cut short: 9,000 bytes where the manifest says")
    assert found[0].endswith("; restore it or index the shards again; 5 samples were not checked")
    beyond = [f"train/s-000000.tar: 's-000000/part/0000{k}': lies beyond the end of the shard" for k in range(1, 5)]
    assert found[1:] == beyond
    tar.unlink()
    assert problems(foreign / "set") == [
        "train/s-000000.tar: the shard is missing; restore it or index the shards again"
    ]
    with pytest.raises(DataError, match=r"s-000000.tar: the shard is missing"):
        open_split(foreign / "set/train")


def test_another_tar_in_place_of_a_foreign_one(foreign: Path) -> None:
    members = [
        m for k in range(3) for m in ((f"part/{k:05d}.jpg", picture(k)), (f"part/{k:05d}.json", b'{"label": "?"}'))
    ]
    tar = write_tar(foreign / "shards/s-000001.tar", [("README.txt", b"longer"), *members])
    manifest = foreign / "set/train/manifest.json"
    values = json.loads(manifest.read_text())
    values["shards"][1] |= {"size": tar.stat().st_size, "sha256": ""}  # a checksum that is not known is not compared
    manifest.write_text(json.dumps(values))
    where = "train/s-000001.tar: "
    beyond = [f"{where}'s-000001/part/0000{k}': lies beyond the end of the shard" for k in (6, 7, 8)]
    strange = [f"{where}sample s-000001/part/0000{k} of the tar is not in the index" for k in range(3)]
    none = "'s-000001/part/00005': the index wants key s-000001/part/00005 here, the tar has no image at that offset"
    assert problems(foreign / "set") == [where + none, *beyond, *strange]


def test_rules_of_a_manifest_that_are_damaged(foreign: Path) -> None:
    manifest = foreign / "set/train/manifest.json"
    values = json.loads(manifest.read_text())
    values["index"]["rules"] = {"images": 3}
    manifest.write_text(json.dumps(values))
    assert problems(foreign / "set")[0].startswith("train/manifest.json: damaged manifest (rules: ")


def test_a_set_behind_a_url(leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OAT_DIST_CACHE", str(tmp_path / "cache"))
    with ShardServer(leaky.parent) as server:
        assert verify.main([f"{server.url}/set"]) == 0
        text = capsys.readouterr().out
        assert "test: 2 images are also in train" in text and text.endswith(f"{server.url}/set: all is well\n")
        patch(leaky / "train/train-000000.tar", 3000, b"\xff\xff")
        assert verify.main([f"{server.url}/set/train"]) == 1
        assert "train/train-000000.tar: its bytes have changed" in capsys.readouterr().out
        assert verify.main([f"{server.url}/none"]) == 2
        assert f"{server.url}/none: no packed split there, nor below it as train, " in capsys.readouterr().err
