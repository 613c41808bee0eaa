"""index: tars of others become a split that is read like a packed one, and are not touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_tars import img2dataset, picture, shard_writer, write_tar
from shard_server import ShardServer, cut, good, in_turn, status
from webdataset.tariterators import group_by_keys, tar_file_expander

from oat_dist import cli
from oat_dist.commands import index as command
from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.write_index import index_shards
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.integrity.verify import verify_output
from oat_dist.data.packing import write_shards
from oat_dist.data.storage import ShardReader
from oat_dist.data.tars import shard_scan
from oat_dist.errors import ConfigError, DataError, OatError
from oat_dist.files import folder_lock

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder of three shards by ShardWriter, and the images. Read only."""
    folder = tmp_path_factory.mktemp("written") / "shards"
    return folder, shard_writer(folder)


def read_all(shards: ShardSet) -> list[bytes]:
    reader = ShardReader(shards)
    data = [reader.read(i) for i in range(len(shards))]
    reader.close()
    return data


def with_webdataset(path: Path) -> list[dict[str, Any]]:
    """The samples of a tar as webdataset groups them. (Its own opening of files leaves them open.)"""
    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def names(shards: ShardSet) -> list[str]:
    return [shards.index.name(i) for i in range(len(shards))]


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(OatError) as error:
        index_shards(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def problems(output: Path) -> list[str]:
    return [f"{p.where}: {p.what}" for report in verify_output(output) for p in report.problems]


# What is read.


def test_shards_of_shard_writer(written: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    folder, images = written
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    indexed = index_shards([folder], tmp_path / "out", workers=2)
    shards = indexed.shards
    assert read_all(shards) == images
    assert shards.index.label.tolist() == [i % 3 for i in range(30)]
    assert shards.index.shard.tolist() == [i // 12 for i in range(30)]
    assert shards.index.width.tolist() == [12 + i % 5 for i in range(30)] and set(shards.index.height) == {9}
    assert names(shards)[:2] == ["s-000000/part/00000", "s-000000/part/00001"] and names(shards)[-1].startswith(
        "s-0000"
    )
    manifest = shards.manifest
    assert (manifest.classes, manifest.class_counts, manifest.split) == (["0", "1", "2"], [10, 10, 10], "train")
    assert manifest.image_sizes == {"min": [12, 9], "median": [14, 9], "max": [16, 9]}
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("s-000000.tar", 12),
        ("s-000001.tar", 12),
        ("s-000002.tar", 6),
    ]
    assert (indexed.others, indexed.left_out, indexed.damaged) == ({"json": 30, "txt": 30}, {}, [])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".packing.lock", "train"]
    assert sorted(p.name for p in (tmp_path / "out/train").iterdir()) == ["index.safetensors", "manifest.json"]
    # The order, the bytes and the labels are those of webdataset itself.
    theirs = [sample for path in sorted(folder.glob("*.tar")) for sample in with_webdataset(path)]
    assert [sample["jpg"] for sample in theirs] == images
    assert [int(sample["cls"]) for sample in theirs] == shards.index.label.tolist()
    assert problems(tmp_path / "out") == []


def test_the_index_does_not_depend_on_workers(written: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    results = set()
    for workers in (1, 3):
        # In a process of its own, which forks: here other tests have threads and torch.
        call = f"index_shards([{str(written[0])!r}], 'o{workers}', workers={workers})"
        code = f"from oat_dist.data.foreign.write_index import index_shards\n{call}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
        results.add(
            tuple((tmp_path / f"o{workers}/train/{n}").read_bytes() for n in ("index.safetensors", "manifest.json"))
        )
    index_shards([written[0]], tmp_path / "o7", workers=7)
    results.add(tuple((tmp_path / f"o7/train/{n}").read_bytes() for n in ("index.safetensors", "manifest.json")))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [
        ("json:label", ["kind 0", "kind 1", "kind 2", "kind 3"], [0, 1, 2, 3, 0]),
        ("json:deep.list.1", ["0", "1"], [0, 1, 0, 1, 0]),
        ("json:a.b", ["0", "1", "2", "3", "4", "5"], [5, 4, 3, 5, 4]),
        ("CLS", ["0", "1", "2"], [0, 1, 2, 0, 1]),
    ],
)
def test_labels(
    written: tuple[Path, list[bytes]], tmp_path: Path, label: str, classes: list[str], labels: list[int]
) -> None:
    shards = index_shards([written[0]], tmp_path, rules=Rules.parse(None, label)).shards
    assert shards.classes == classes
    assert shards.index.label[:5].tolist() == labels
    assert problems(tmp_path) == []


def test_img2dataset(tmp_path: Path, capsys: Capture) -> None:
    images = img2dataset(tmp_path / "laion")
    label = ("--label", "json:meta.species")
    assert command.main([str(tmp_path / "laion"), "--output", str(tmp_path / "out"), *label]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/laion/00000.tar: 1 of 6 samples cannot be used, 1 without an image (first: 000000002; "
        "there is no image); leave such samples out and list them with --on-missing skip\n"
    )
    assert not (tmp_path / "out/train").exists()
    assert (
        command.main([str(tmp_path / "laion"), "--output", str(tmp_path / "out"), *label, "--on-missing", "skip"]) == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("train: 10 images of 2 classes (5 to 5 each), ")
    assert (
        "  not used: 12 .txt\n  left out: 2 samples, 2 without an image\n    00000/000000002: there is no image\n"
        in text
    )
    assert text.endswith(f"next: oat-dist verify {tmp_path}/out\n")
    shards = open_split(tmp_path / "out/train")
    assert read_all(shards) == list(images.values())
    # the failed ones had a class of their own, which must not become one
    assert shards.classes == ["ant", "bee"] and shards.index.label.tolist() == [i % 2 for i in images]
    assert [bad["name"] for bad in shards.manifest.skipped] == ["00000/000000002", "00001/000010003"]
    assert problems(tmp_path / "out") == []


def test_where_the_labels_may_be(tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion", failed=())
    text = refusal([tmp_path / "laion"], tmp_path / "out")
    assert (
        "6 of 6 samples cannot be used, 6 without a label (first: 000000000, 000000001, 000000002; there is no .cls)"
        in text
    )
    assert "say where: --label, members there are json, txt (json:KEY with KEY one of caption, url, key, status" in text
    assert "meta.species)" in text
    text = refusal(
        [tmp_path / "laion"], tmp_path / "out", rules=Rules.parse(None, "json:meta.genus"), on_missing="skip"
    )
    assert text.startswith("no sample of 2 shard(s) can be used: 12 without a label; if the labels are not in .json")


@pytest.mark.parametrize("decode", [True, False])
def test_unusable_samples(tmp_path: Path, decode: bool) -> None:
    whole = picture(1)
    members = [
        ("a.jpg", whole),
        ("a.cls", b"0\n"),
        ("b.jpg", whole[:-9]),  # its header is whole
        ("b.cls", b"1"),
        ("c.jpg", b"no image"),
        ("c.cls", b"1"),
        ("d.jpg", whole),
        ("e.cls", b"1"),
        ("f.jpg", whole),
        ("f.cls", b"  "),
        ("g.jpg", whole),
        ("g.cls", b"\xff\xfe"),
        ("h.jpg", b""),
        ("h.cls", b"1"),
        ("i.cls", b"1"),
        ("i.png", picture(2, "PNG")),
    ]
    tar = write_tar(tmp_path / "t.tar", members)
    indexed = index_shards([tar], tmp_path / "out", on_missing="skip", decode=decode)
    assert names(indexed.shards) == ["t/a", "t/i"] if decode else ["t/a", "t/b", "t/i"]
    reasons = {bad["name"]: bad["reason"] for bad in indexed.shards.manifest.skipped}
    damaged = reasons.pop("t/b", None)
    assert (damaged is not None and damaged.startswith("unreadable image (")) == decode
    assert reasons == {
        "t/c": "unreadable image (not an image of a known kind)",
        "t/d": "there is no .cls",
        "t/e": "there is no image",
        "t/f": "the label in .cls is empty",
        "t/g": "unreadable label (.cls is no UTF-8 text)",
        "t/h": "unreadable image (the file is empty)",
    }
    assert indexed.left_out == {"no image": 1, "no label": 2, "unreadable image": 2 + decode, "unreadable label": 1}
    assert any("unreadable image" in line for line in problems(tmp_path / "out")) != decode


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "unreadable label (.json is no JSON)"),
        (b'{"k": null}', "k is null"),
        (b'{"k": []}', "unreadable label (k is [], neither text nor a whole number)"),
        (b'{"k": 0.5}', "unreadable label (k is 0.5, neither text nor a whole number)"),
        (b'{"k": NaN}', "unreadable label (k is NaN, neither text nor a whole number)"),
        (b'{"l": 1}', "the JSON has no k"),
        (b"[1]", "the JSON has no k"),
        (b"[" * 100_000, "unreadable label (.json is no JSON)"),
        (b'{"k": "two\\nlines"}', "unreadable label (.json has 9 characters: two\\nlines...)"),
        (b'{"k": "%s"}' % (b"x" * 300), f"unreadable label (.json has 300 characters: {'x' * 40}...)"),
    ],
)
def test_unreadable_json(tmp_path: Path, data: bytes, reason: str) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", picture(1)), ("a.json", data)])
    text = refusal([tar], tmp_path / "out", rules=Rules.parse(None, "json:k"))
    assert f"(first: a; {reason}); " in text


def test_values_in_json_that_are_whole(tmp_path: Path) -> None:
    values = [b"true", b"false", b'"true"']
    members = [
        part for i, v in enumerate(values) for part in ((f"{i}.jpg", picture(i)), (f"{i}.json", b'{"k":%s}' % v))
    ]
    shards = index_shards(
        [write_tar(tmp_path / "t.tar", members)], tmp_path / "out", rules=Rules.parse(None, "json:k")
    ).shards
    assert shards.classes == ["false", "true"] and shards.index.label.tolist() == [1, 0, 1]
    members = [("0.jpg", picture(0)), ("0.json", b'{"k": 1.0}'), ("1.jpg", picture(1)), ("1.json", b'{"k": 0}')]
    shards = index_shards(
        [write_tar(tmp_path / "u.tar", members)], tmp_path / "o2", rules=Rules.parse(None, "json:k")
    ).shards
    assert shards.index.label.tolist() == [1, 0]


def test_several_images_in_a_sample(tmp_path: Path) -> None:
    members = []
    for key in ("a", "dir.d/b"):
        for kind in ("left.png", "right.png", "PPM"):
            seed = ord(key[-1]) + len(kind)
            members.append((f"{key}.{kind}", picture(seed, "PPM" if kind == "PPM" else "PNG")))
        members.append((f"{key}.cls", b"0"))
    tar = write_tar(tmp_path / "t.tar", members)
    assert refusal([tar], tmp_path / "out") == (
        f"{tar}: sample a has several images, .left.png and .right.png (a key ends at the first dot of a file name); "
        "say which one counts: --image-key"
    )
    for key, kind in (("left.png", "left.png"), ("ppm", "PPM"), ("jpg;right.png;ppm", "right.png")):
        shards = index_shards([tar], tmp_path / key, rules=Rules.parse(key, "cls")).shards
        assert read_all(shards) == [data for name, data in members if name.endswith(kind)]
        assert names(shards) == ["t/a", "t/dir.d/b"]
        assert problems(tmp_path / key) == []
    text = refusal([tar], tmp_path / "out", rules=Rules.parse("jpg", "cls"))
    assert "2 of 2 samples cannot be used, 2 without an image" in text


@pytest.mark.parametrize(
    ("image", "label", "text"),
    [
        ("", "cls", "image key '': give the extension"),
        ("jpg;", "cls", "image key 'jpg;': give the extension"),
        (None, "json", "label 'json': say which value of the JSON, as in json:label"),
        (None, "json:", "label 'json:': give the extension of the label member"),
        (None, "", "label '': give the extension of the label member"),
    ],
)
def test_rules_that_are_none(image: str | None, label: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        Rules.parse(image, label)


# Classes.


def labelled(path: Path, labels: list[str]) -> Path:
    return write_tar(
        path, [m for i, v in enumerate(labels) for m in ((f"{i}.jpg", picture(i)), (f"{i}.cls", v.encode()))]
    )


def test_splits_share_their_classes(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    train = labelled(tmp_path / "train.tar", ["cat", "dog", "eel"])
    val = labelled(tmp_path / "val.tar", ["eel", "cat"])
    index_shards([train], out)
    assert cli.main(["index", str(val), "--output", str(out), "--split", "val"]) == 0
    shards = open_split(out / "val")
    assert shards.classes == ["cat", "dog", "eel"] and shards.index.label.tolist() == [2, 0]
    text = capsys.readouterr().out
    assert f"classes from {out}/train/manifest.json\n  without any image: 1 classes, dog\n" in text
    assert problems(out) == []
    assert [note.what for report in verify_output(out) for note in report.notes] == ["class 'dog' is empty"]
    assert refusal([labelled(tmp_path / "x.tar", ["cot"])], out, split="x") == (
        f"label 'cot' is none of the 3 classes of {out}/train/manifest.json; did you mean 'cat'? mend either of them"
    )


def test_class_names_from_a_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffzebra\r\nape\r\nçat\r\n\r\n".encode())
    tar = labelled(tmp_path / "t.tar", ["3", "1", "3"])
    base = [str(tar), "--output", str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt")]
    assert command.main(base) == 2
    assert (
        "label 3 is out of range for the 3 classes of --classes (0 to 2); if they count from 1, give --first-label 1"
        in (capsys.readouterr().err)
    )
    assert command.main([*base, "--first-label", "1"]) == 0
    shards = open_split(tmp_path / "out/train")
    assert shards.classes == ["zebra", "ape", "çat"] and shards.index.label.tolist() == [2, 0, 2]
    assert problems(tmp_path / "out") == []
    text = labelled(tmp_path / "u.tar", ["ape", "zebra"])
    assert command.main([str(text), *base[1:], "--split", "two"]) == 0
    assert open_split(tmp_path / "out/two").index.label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file; give a text file"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"\n\n", "is empty; write one class name a line"),
        (b"a\n\nb", ", line 2: '' is no class name"),
        (b"a\nb\na", ", line 3: 'a' is there already in line 1"),
    ],
)
def test_class_files_that_are_none(tmp_path: Path, capsys: Capture, content: bytes | None, text: str) -> None:
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    tar = labelled(tmp_path / "t.tar", ["0"])
    assert command.main([str(tar), "--output", str(tmp_path / "out"), "--classes", str(path)]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "first", "text"),
    [
        (
            ["0", "cat"],
            0,
            "some labels are numbers (0) and some are names (cat); choose another --label, or mend the data",
        ),
        (["0", "-1"], 0, "label -1 lies below the first class, 0; -1 often stands for none: choose another --label"),
        (["0", "2"], 1, "label 0 lies below the first class, 1; leave out --first-label"),
        (["a", "b"], 1, "--first-label counts numbers, but the labels are names (a); leave it out"),
        (
            ["5", "123456"],
            0,
            "labels run up to 123,456 in 2 samples: these are ids, not classes; choose another --label",
        ),
    ],
)
def test_labels_that_make_no_classes(tmp_path: Path, labels: list[str], first: int, text: str) -> None:
    tar = labelled(tmp_path / "t.tar", labels)
    assert refusal([tar], tmp_path / "out", rules=Rules.parse(None, "cls", first)) == text


def test_captions_are_no_classes(tmp_path: Path) -> None:
    image = picture(0)
    members = [m for i in range(1100) for m in ((f"{i}.jpg", image), (f"{i}.txt", b"photo %d" % i))]
    tar = write_tar(tmp_path / "t.tar", members)
    assert refusal([tar], tmp_path / "out", rules=Rules.parse(None, "txt"), decode=False) == (
        "1,100 different labels for 1,100 samples ('photo 0'): these are captions or names, not classes; choose "
        "another --label"
    )


# Where the shards are, and where the index goes.


def test_ways_to_name_shards(
    written: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = written
    all_three = [str(folder / f"s-{i:06d}.tar") for i in range(3)]
    monkeypatch.chdir(folder.parent)
    ways: list[list[str | Path]] = [
        [*all_three],
        [folder / "s-{000000..000002}.tar"],
        [f"{folder}/s-00000{{0,1}}.tar", f"{folder}/s-000002.tar"],
        [folder / "*.tar"],
        ["shards/s-*.tar"],
        ["shards"],
        [f"file://{folder}/s-00000[0-2].tar"],
        ["./shards/../shards"],
    ]
    digests = {index_shards(way, tmp_path / str(k), decode=False).shards.digest for k, way in enumerate(ways)}
    assert len(digests) == 1
    backwards = index_shards(all_three[::-1], tmp_path / "b", decode=False).shards
    assert read_all(backwards) == [*images[24:], *images[12:24], *images[:12]]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("none.tar", "none.tar: no such file; give tars, folders of tars, wildcards, braces"),
        ("x-*.tar", "x-*.tar: no file has such a name; give tars"),
        ("{000..002.tar", "{000..002.tar: a brace is not closed; write a range as {000000..000012}"),
        ("empty", "empty: holds no *.tar; give tars"),
        ("packed", "packed: its tars are compressed (b.tar.gz); unpack them to plain .tar first"),
        (
            "pipe:cat x.tar",
            "pipe:cat x.tar: what a command writes cannot be indexed; train on it with data.mode=stream",
        ),
        ("s3://bucket/*.tar", "s3://bucket/*.tar: wildcards work for local files only; write braces"),
        ("s3://bucket/folder/", "s3://bucket/folder/: names no file; give the URL of a tar"),
        *(
            (url, f"{text}: holds a user name or password, and the manifest would keep it; leave it out, and give the")
            for url, text in (
                ("http://me:secret@host/a.tar", "http://host/a.tar"),
                ("https://secret@host/a.tar", "https://host/a.tar"),
                ("https://:secret@host/a.tar", "https://host/a.tar"),
                ("http://me:sec/secret@host/a.tar", "http://host/a.tar"),
                ("s3://k:s/secret@b/{0..1}.tar", "s3://b/0.tar"),
            )
        ),
        ("https://host/a.tar?sig=secret", "https://host/a.tar?...: holds a query (?...), and the manifest would keep"),
        ("s3://b/a.tar?x=1 y=secret", "s3://b/a.tar?...: holds a query (?...), and the manifest would keep it"),
        ("http://[x/a.tar", "http://[x/a.tar: is no URL (Invalid IPv6 URL); mend it"),
        ("nosuch://x/a.tar", "nosuch://x/a.tar: Protocol not known: nosuch"),
    ],
)
def test_shards_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/b.tar.gz").touch()
    found = refusal([pattern], "out")
    assert "user name" not in found or "~/.netrc" in found
    assert found.startswith(text) and "secret" not in found


def test_shards_named_twice_and_of_one_name(tmp_path: Path) -> None:
    a, b = labelled(tmp_path / "a/0.tar", ["0", "1"]), labelled(tmp_path / "b/0.tar", ["1"])
    assert refusal([a, a], tmp_path / "out") == f"{a}: named twice; leave one of them out"
    shards = index_shards([a, b], tmp_path / "out").shards
    assert names(shards) == ["000000-0/0", "000000-0/1", "000001-0/0"]
    assert [(s.name, s.url) for s in shards.manifest.shards] == [
        ("000000-0.tar", "../../a/0.tar"),
        ("000001-0.tar", "../../b/0.tar"),
    ]
    assert read_all(shards) == [picture(0), picture(1), picture(0)] and problems(tmp_path / "out") == []


def test_a_damaged_split_beside(tmp_path: Path) -> None:
    tar = labelled(tmp_path / "a.tar", ["0", "1"])
    (tmp_path / "out/test/manifest.json").mkdir(parents=True)
    assert refusal([tar], tmp_path / "out").startswith(f"{tmp_path}/out/test/manifest.json: cannot be read (Is a dir")


def test_index_and_shards_move_together(tmp_path: Path) -> None:
    index_shards([labelled(tmp_path / "all/shards/0.tar", ["0", "1"])], tmp_path / "all/out")
    (tmp_path / "all").rename(tmp_path / "moved")
    assert read_all(open_split(tmp_path / "moved/out/train")) == [picture(0), picture(1)]
    far = index_shards([tmp_path / "moved/shards"], tmp_path / "else/where/out").shards
    assert far.manifest.shards[0].url == str(tmp_path / "moved/shards/0.tar")


def test_index_beside_its_tars(tmp_path: Path, capsys: Capture) -> None:
    tar = labelled(tmp_path / "set/train/0.tar", ["0", "1"])
    content = tar.read_bytes()
    (tmp_path / "set/train/0_stats.json").write_text("{}")
    arguments = [str(tar), "--output", str(tmp_path / "set")]
    assert command.main(arguments) == 0
    assert open_split(tmp_path / "set/train").manifest.shards[0].url == "0.tar"
    assert problems(tmp_path / "set") == []
    capsys.readouterr()
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/set/train: is indexed already; choose another folder or --split, or replace it: "
        "--overwrite\n"
    )
    assert command.main([*arguments, "--overwrite", "--label", "cls"]) == 0
    with pytest.raises(DataError, match=r"set/train: will not be replaced, it holds '"):
        write_shards([("x", "a", picture(0))], tmp_path / "set/train", overwrite=True)
    (tmp_path / "set/train/0_stats.json").unlink()
    with pytest.raises(DataError, match=r"set/train: will not be replaced, it holds '.not-packed'"):
        write_shards([("x", "a", picture(0))], tmp_path / "set/train", overwrite=True)
    assert tar.read_bytes() == content


def test_what_is_never_replaced(tmp_path: Path) -> None:
    tar = labelled(tmp_path / "0.tar", ["a", "b"])
    write_shards([("x", "a", picture(0)), ("y", "b", picture(1))], tmp_path / "out/train")
    before = {path: path.read_bytes() for path in (tmp_path / "out/train").iterdir()}
    assert refusal([tar], tmp_path / "out", overwrite=True) == (
        f"{tmp_path}/out/train: holds a packed split, which will not be replaced; choose another folder or --split"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out/train").iterdir()} == before
    (tmp_path / "out/odd").mkdir()
    (tmp_path / "out/odd/index.safetensors").touch()
    assert "out/odd/manifest.json: missing or damaged, so what is here will not be replaced" in refusal(
        [tar], tmp_path / "out", split="odd", overwrite=True
    )
    (tmp_path / "out/file").touch()
    assert refusal([tar], tmp_path / "out", split="file").endswith(
        "a file is in the way; move it, or choose another folder"
    )
    assert refusal([tar], tmp_path / "out", split="../up").startswith("split name '../up': use letters")
    assert refusal([tar], tmp_path / "0.tar").startswith(f"{tmp_path}/0.tar: cannot be made or written to")
    with folder_lock(tmp_path / "out", "", name=".packing.lock"):
        assert "another process is writing into this folder" in refusal([tar], tmp_path / "out", split="new")


def test_a_stopped_index_leaves_nothing(tmp_path: Path) -> None:
    good, bad = labelled(tmp_path / "0.tar", ["0", "1"]), tmp_path / "1.tar"
    bad.write_bytes(good.read_bytes()[:3000])
    assert refusal([good, bad], tmp_path / "out").startswith(f"{bad}: cut short: ends after 3,000 bytes")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".packing.lock"]
    (tmp_path / "out/.indexing-train/stops").mkdir(parents=True)  # of one that was killed
    indexed = index_shards([bad, good], tmp_path / "out", on_missing="skip")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".packing.lock", "train"]
    assert indexed.damaged == [f"{bad}: cut short: ends after 3,000 bytes without the end marker of a tar; restore it"]
    assert names(indexed.shards) == ["0/0", "0/1"] and read_all(indexed.shards) == [picture(0), picture(1)]
    assert indexed.shards.manifest.skipped[0]["reason"].startswith("the whole shard: cut short")
    assert refusal([bad], tmp_path / "none", on_missing="skip").startswith(
        "no sample can be used: 1 of 1 shards are damaged;"
    )
    empty = write_tar(tmp_path / "2.tar", [("README", b"x"), (".hidden.jpg", b"x")])
    assert refusal([empty], tmp_path / "none").startswith(f"{empty}: holds no samples (members such as 000000.jpg")


# Remote.


@pytest.fixture
def server(written: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ShardServer]:
    monkeypatch.setattr(shard_scan, "FIRST_DELAY_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OAT_DIST_CACHE", str(tmp_path / "cache"))
    with ShardServer(written[0].parent) as server:
        yield server


def test_remote_shards(server: ShardServer, written: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    server.behaviours["s-000001.tar"] = in_turn(status(503), cut, good)
    indexed = index_shards([f"{server.url}/shards/s-{{000000..000002}}.tar"], tmp_path / "far")
    # each was read once, but for the two tries that failed; nothing was kept
    assert server.requests == {"s-000000.tar": 1, "s-000001.tar": 3, "s-000002.tar": 1}
    assert not (tmp_path / "cache/shards").exists()
    near = index_shards([written[0]], tmp_path / "near").shards
    far = indexed.shards
    assert [s.url for s in far.manifest.shards] == [f"{server.url}/shards/s-{i:06d}.tar" for i in range(3)]
    assert far.index.to_bytes() == near.index.to_bytes()
    assert [s.sha256 for s in far.manifest.shards] == [s.sha256 for s in near.manifest.shards]
    assert problems(tmp_path / "far") == []
    assert read_all(far) == written[1]


def test_remote_shards_that_fail(server: ShardServer, tmp_path: Path) -> None:
    url = f"{server.url}/shards/s-000000.tar"
    server.behaviours["s-000000.tar"] = status(500)
    assert refusal([url], tmp_path / "out").startswith(f"{url}: cannot be read (HTTP 500 ")
    assert server.requests["s-000000.tar"] == shard_scan.TRIES
    server.behaviours["s-000000.tar"] = status(403)
    assert refusal([url], tmp_path / "out").startswith(f"{url}: cannot be read (HTTP 403 ")
    assert server.requests["s-000000.tar"] == shard_scan.TRIES + 1
    none = f"{server.url}/shards/none.tar"
    assert refusal([none], tmp_path / "out").startswith(f"{none}: cannot be read (it is not there); check the URL")
    assert not (tmp_path / "out/train").exists()


def test_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "img2dataset" in text and "--on-missing {stop,skip}" in text


def test_images_of_all_kinds(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF"}
    kinds |= {"tiff": "TIFF", "ppm": "PPM"}
    members = [m for k, (e, f) in enumerate(kinds.items()) for m in ((f"{k}.{e}", picture(k, f)), (f"{k}.cls", b"0"))]
    tar = write_tar(tmp_path / "t.tar", members)
    for decode in (True, False):
        shards = index_shards([tar], tmp_path / str(decode), decode=decode).shards
        assert read_all(shards) == [picture(k, f) for k, f in enumerate(kinds.values())]
        assert {*shards.index.width.tolist()} == {12} and {*shards.index.height.tolist()} == {9}
