"""Tables of (path, label), the flat folders of BAR, and which options belong to which source."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES, PackPlan, add_source_arguments, plan_source
from oat_dist.errors import DataError


def image(kind: str = "JPEG", *, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def fill(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(seed=seed))
    return root


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def plan(table: Path, splits: dict[str, Any] | None = None, **settings: Any) -> PackPlan:
    return SOURCES["table"](str(table), splits=splits or {}, seed=0, **settings)


def names_and_labels(found: PackPlan) -> dict[str, list[tuple[str, int | str]]]:
    return {split: [(s.name, s.label) for s in samples] for split, samples in found.splits.items()}


def refusal(table: Path, splits: dict[str, Any] | None = None, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        plan(table, splits, **settings)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{table.parent}/", "")


# Tables


def test_the_same_rows_in_every_form(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b 2.jpg", 'c,"3".jpg', "d.jpg")
    rows = [("a/1.jpg", "cat", "Train"), ("b 2.jpg", "dog", "Train"), ('c,"3".jpg', "cat", "validation")]
    rows.append(("d.jpg", "dog", "validation"))
    quoted = [('"' + path.replace('"', '""') + '"', label, split) for path, label, split in rows]
    tables = [
        write(tmp_path / "t.csv", "path,label,split\n" + "".join(",".join(row) + "\n" for row in quoted)),
        # a mark of byte order, Windows line ends, columns in another order, one more, an empty line, no last line end
        write(
            tmp_path / "excel.csv",
            "\ufeffsplit, label ,n,path\r\n\r\n" + "\r\n".join(f"{s},{y} ,7,{p}" for p, y, s in quoted),
        ),
        write(tmp_path / "T.TSV", "path\tlabel\tsplit\n" + "".join("\t".join(row) + "\n" for row in quoted)),
        write(
            tmp_path / "t.jsonl",
            "\n\n".join(json.dumps({"label": y, "path": p, "split": s, "more": [1]}) for p, y, s in rows),
        ),
    ]
    for table in tables:
        found = plan(table)
        assert found.classes == ["cat", "dog"] and found.notes == [] and found.source == "table"
        assert names_and_labels(found) == {
            "train": [("a/1.jpg", "cat"), ("b 2.jpg", "dog")],
            "val": [('c,"3".jpg', "cat"), ("d.jpg", "dog")],
        }
        assert list(plan(table, {"val": None}).splits) == ["val"]
    packed = write_splits(plan(tables[0]).splits, tmp_path / "out", classes=["cat", "dog"])
    assert [packed["val"].index.name(i) for i in range(2)] == ['c,"3".jpg', "d.jpg"]


def test_columns_of_other_names_and_paths_relative_to_a_root(tmp_path: Path) -> None:
    fill(tmp_path / "images", "1.jpg", "x/2.jpg", "3.jpg")
    fill(tmp_path, "4.jpg")
    table = write(
        tmp_path / "t.csv",
        f"file,class,part\n./1.jpg,x,a\n{tmp_path}/images/x/2.jpg,y,a\nx/../3.jpg,x,b\n{tmp_path}/4.jpg,y,b\n",
    )
    settings = {"path_column": "file", "label_column": "class", "root": str(tmp_path / "images")}
    dealt = plan(table, {"one": None}, **settings)
    assert names_and_labels(dealt) == {
        # outside of the root: its whole path, since there is no other
        "one": [("1.jpg", "x"), ("x/2.jpg", "y"), ("3.jpg", "x"), (f"{tmp_path}/4.jpg", "y")]
    }
    assert list(plan(table, split_column="part", **settings).splits) == ["a", "b"]


def test_numbers_stay_in_their_order(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{k}.jpg" for k in range(12)))
    lines = "".join(f"{k}.jpg,{11 - k}\n" for k in range(12))
    found = plan(write(tmp_path / "t.csv", "path,label\n" + lines))
    assert found.classes == [str(k) for k in range(12)] and found.notes == []
    assert names_and_labels(found)["train"][0] == ("0.jpg", "11")
    as_json = "".join(json.dumps({"path": f"{k}.jpg", "label": k + 1}) + "\n" for k in range(11))
    found = plan(write(tmp_path / "t.jsonl", as_json))
    assert found.classes == [str(k) for k in range(1, 12)]
    assert found.notes == ["labels are 11 numbers from 1 to 11; class 0 is '1'"]
    # 007 and 7 are not the same number: names then
    mixed = plan(write(tmp_path / "m.csv", "path,label\n1.jpg,007\n2.jpg,7\n3.jpg,10\n"))
    assert mixed.classes == ["007", "10", "7"]


def test_a_file_of_classes_says_names_and_order(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    classes = str(write(tmp_path / "classes.txt", "\ufeffzebra\r\nant\r\nbee\r\n\r\n"))
    for labels in (("ant", "zebra", "bee"), ("1", "0", "2")):
        lines = "".join(f"{k}.jpg,{label}\n" for k, label in enumerate(labels, 1))
        found = plan(write(tmp_path / "t.csv", "path,label\n" + lines), classes=classes)
        assert found.classes == ["zebra", "ant", "bee"]
        assert names_and_labels(found)["train"] == [("1.jpg", "ant"), ("2.jpg", "zebra"), ("3.jpg", "bee")]


def test_dealing_a_table_to_splits(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{k}.jpg" for k in range(10)))
    table = write(tmp_path / "t.csv", "path,label\n" + "".join(f"{k}.jpg,{'ab'[k % 2]}\n" for k in range(10)))
    dealt = SOURCES["table"](str(table), splits={"train": 4 / 5, "val": 1 / 5}, seed=0).splits
    assert {split: Counter(s.label for s in part) for split, part in dealt.items()} == {
        "train": Counter(a=4, b=4),
        "val": Counter(a=1, b=1),
    }


def test_missing_files_are_named_with_their_lines(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    lines = ["a.jpg,x", "gone.jpg,x", '"new\nline.jpg",y', "pipe.jpg,y", "folder.jpg,y", "b.jpg,y", "nul\0.jpg,x"]
    table = write(tmp_path / "t.csv", "path,label\n" + "\n".join(lines))
    listed = (
        r"gone.jpg (line 3), 'new\nline.jpg' (line 4), pipe.jpg (line 6), folder.jpg (line 7), 'nul\x00.jpg' (line 9)"
    )
    with pytest.raises(DataError) as error:
        plan(table)
    assert str(error.value) == (
        f"{table}: 5 of 7 files are missing: {listed}; paths are relative to {tmp_path} (--root); "
        "or leave them out with --on-bad skip"
    )
    table = write(tmp_path / "t.csv", "path,label\n" + "\n".join(lines[:2] + lines[3:6]))
    found = plan(table, on_bad="skip")
    assert found.notes == ["3 of 5 files are missing: gone.jpg (line 3), pipe.jpg (line 4), folder.jpg (line 5)"]
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, on_bad="skip")
    assert len(packed["train"]) == 2
    assert packed["train"].manifest.skipped == [
        {"name": "folder.jpg", "reason": "line 5: not a file"},
        {"name": "gone.jpg", "reason": "line 3: No such file or directory"},
        {"name": "pipe.jpg", "reason": "line 4: not a file"},
    ]
    assert refusal(write(tmp_path / "t.csv", "path,label\nq.jpg,x\nr.jpg,y\n"), on_bad="skip") == (
        f"t.csv: 2 of 2 files are missing: q.jpg (line 2), r.jpg (line 3); paths are relative to {tmp_path} (--root)"
    )


def test_a_file_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b.jpg")
    rows = "a.jpg,x,train\nb.jpg,y,train\n./a.jpg,x,test\n"
    assert plan(write(tmp_path / "t.csv", "path,label,split\n" + rows)).notes == [
        "leak: 1 files are in more than one split: a.jpg"
    ]
    again = write(tmp_path / "t.csv", "path,label,split\n" + rows + "a.jpg,x,test\n")
    assert refusal(again) == "t.csv: line 5: 'a.jpg' is in line 4 already; remove one"
    # what lies in a split that is not packed need not be there
    table = write(tmp_path / "t.csv", "path,label,split\na.jpg,x,train\nb.jpg,y,train\ngone.jpg,y,test\n")
    assert plan(table, {"train": None}).notes == []


TABLES: list[tuple[str, str | bytes, dict[str, str], str]] = [
    ("t.txt", "path,label\n", {}, "t.txt: a table is a file named .csv, .tsv or .jsonl; give one of these"),
    ("t.csv", "", {}, "t.csv: has no rows; nothing to pack"),
    ("t.csv", "path,label\n\n", {}, "t.csv: has no rows; nothing to pack"),
    (
        "t.csv",
        "a.jpg,x\nb.jpg,y\n",
        {},
        "t.csv: the first line names no column 'path'; it has 'a.jpg', 'x'; choose with --path-column",
    ),
    (
        "t.csv",
        "path,class\na.jpg,x\n",
        {},
        "t.csv: the first line names no column 'label'; it has 'path', 'class'; choose with --label-column",
    ),
    (
        "t.csv",
        "path,label\na.jpg,x\n",
        {"split_column": "part"},
        "t.csv: the first line names no column 'part'; it has 'path', 'label'; choose with --split-column",
    ),
    (
        "t.csv",
        "path;label\na.jpg;x\n",
        {},
        "t.csv: the first line names no column 'path'; it has 'path;label'; choose with --path-column; "
        "are its columns separated by ';'? Use ','",
    ),
    ("t.csv", "path,label,label\na.jpg,x,y\n", {}, "t.csv: two columns are named 'label'; rename one"),
    (
        "t.csv",
        'path,label\n"a\nb",x\na.jpg\n',
        {},
        't.csv: line 4: has 1 fields, the first line 2; put a field that holds the separator into "quotes"',
    ),
    ("t.csv", 'path,label\na.jpg,x\n"b.jpg,y\n', {}, "t.csv: line 3: unexpected end of data; mend the quotes"),
    ("t.csv", "path,label\na.jpg, \n", {}, "t.csv: line 2: label is empty"),
    ("t.csv", "path,label\n,x\n", {}, "t.csv: line 2: path is empty"),
    ("t.csv", "path,label\na.jpg,x\na.jpg,y\n", {}, "t.csv: line 3: 'a.jpg' is in line 2 already; remove one"),
    ("t.csv", "path,label\na.jpg,x\n./a.jpg,y\n", {}, "t.csv: line 3: './a.jpg' is in line 2 already"),
    ("t.csv", "path,label\na.jpg,x\nb.jpg,x\n", {}, "t.csv: has 1 class; a classifier needs two"),
    ("t.csv", "path,label\na.jpg,-1\nb.jpg,0\n", {}, "t.csv: line 2: label -1 is below 0; number the classes from 0"),
    ("t.csv", "path,label\na.jpg,x\nb.jpg,z\n", {"classes": "c"}, "t.csv: line 3: label 'z' is not in c; add it there"),
    (
        "t.csv",
        "path,label\na.jpg,1\nb.jpg,2\n",
        {"classes": "c"},
        "t.csv: line 3: label 2 is out of range for the 2 classes of c (0 to 1)",
    ),
    (
        "t.csv",
        "path,label\na.jpg,x\nb.jpg,y\n",
        {"classes": "nowhere"},
        "nowhere: cannot be read (No such file or directory); --classes is a text file, one class name a line",
    ),
    ("t.csv", "path,label\na.jpg,x\nb.jpg,y\n", {"classes": "empty"}, "empty: has 0 classes; a classifier needs two"),
    (
        "t.csv",
        "path,label\na.jpg,x\nb.jpg,y\n",
        {"root": "nowhere"},
        "nowhere: no such folder; --root is the folder that the paths are relative to",
    ),
    ("t.csv", "path,label\n".encode("utf-16"), {}, "t.csv: is not text in UTF-8; save it so"),
    ("t.jsonl", '{"path": "a.jpg", "label": 1', {}, "t.jsonl: line 1: not JSON (Expecting ',' delimiter); write one"),
    ("t.jsonl", "[" * 100_000, {}, "t.jsonl: line 1: not JSON ("),
    ("t.jsonl", '["a.jpg", 1]', {}, 't.jsonl: line 1: not an object such as {"path": "a.jpg", "label": "cat"}'),
    ("t.jsonl", '\n{"file": "a.jpg", "label": 1}', {}, "t.jsonl: line 2: has no 'path'; it has 'file', 'label'"),
    ("t.jsonl", '{"path": "a.jpg", "label": 1.0}', {}, "t.jsonl: line 1: label is 1.0, not a text or a whole number"),
    ("t.jsonl", '{"path": "a.jpg", "label": true}', {}, "t.jsonl: line 1: label is True, not a text or a whole number"),
    ("t.jsonl", '{"path": 5, "label": 1}', {}, "t.jsonl: line 1: path is 5, not a text"),
    (
        "t.jsonl",
        '{"path": "a.jpg", "label": "x", "split": "train"}\n{"path": "b.jpg", "label": "y"}',
        {},
        "t.jsonl: line 2: has no 'split'; it has 'path', 'label'",
    ),
]


@pytest.mark.parametrize(("name", "content", "settings", "message"), TABLES)
def test_faulty_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, settings: dict[str, str], message: str
) -> None:
    fill(tmp_path, "a.jpg", "b.jpg", "a\nb")
    write(tmp_path / "c", "x\ny\n")
    write(tmp_path / "empty", "\n")
    monkeypatch.chdir(tmp_path)
    assert refusal(write(tmp_path / name, content), **settings).startswith(message)


def test_tables_and_splits_that_are_not_there(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b.jpg")
    assert refusal(tmp_path / "gone.csv") == "gone.csv: no such file; check the path"
    (tmp_path / "folder.csv").mkdir()
    assert refusal(tmp_path / "folder.csv") == "folder.csv: cannot be read (Is a directory); check its permissions"
    table = write(tmp_path / "t.csv", "path,label,split\na.jpg,x,train\nb.jpg,y,train\n")
    assert refusal(table, {"val": None}) == "t.csv: has no split 'val'; it has train"
    assert (
        refusal(table, {"a": 0.5, "b": 0.5})
        == "t.csv: is split already (train); leave the shares out of --split, or use --hold-out"
    )


# BAR


def bar(root: Path, splits: dict[str, Any] | None = None) -> PackPlan:
    return SOURCES["bar"](str(root), splits=splits or {}, seed=0)


BAR_CLASSES = ["climbing", "diving", "fishing", "pole vaulting", "racing", "throwing"]


def test_bar_as_published(tmp_path: Path) -> None:
    kinds: dict[str, bytes] = {
        "pole vaulting_1.jpg": image("PNG", seed=1),
        "racing_1.jpg": image("PNG", seed=2, mode="P"),
        "diving_1.jpg": image(seed=3, progressive=True),
        "fishing_1.jpg": image(seed=4, mode="L"),
    }
    for split in ("train", "test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for seed, label in enumerate(BAR_CLASSES):
            for number in (1, 12):
                name = f"{label}_{number}.jpg"
                (tmp_path / "in" / split / name).write_bytes(kinds.get(name) or image(seed=100 * seed + number))
    found = bar(tmp_path / "in")
    assert found.classes == BAR_CLASSES and list(found.splits) == ["train", "test"]
    assert found.notes == ["not as many as in BAR as published (in brackets): train has 12 (1,941), test has 12 (654)"]
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, source=found.source)
    for split in ("train", "test"):
        shards = packed[split]
        assert len(shards) == 12 and shards.manifest.class_counts == [2] * 6
        tar = (shards.folder / shards.manifest.shards[0].name).read_bytes()
        for i in range(len(shards)):
            start, length = int(shards.index.offset[i]), int(shards.index.length[i])
            source = (tmp_path / "in" / shards.index.name(i)).read_bytes()
            assert tar[start : start + length] == source and decode_rgb(source).shape == (6, 8, 3)
            assert shards.classes[shards.index.label[i]] == shards.index.name(i).split("/")[1].rpartition("_")[0]
    assert list(bar(tmp_path / "in", {"test": None}).splits) == ["test"]


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    good = ["a_b_1.jpg", "c_2.JPEG"]
    bad = ["_3.jpg", "c.jpg", "c_.jpg", "c_x.jpg", "c_1.txt"]
    for split in ("train", "test"):
        fill(tmp_path / split, *good, *(bad if split == "train" else []))
    (tmp_path / "train/folder_1.jpg").mkdir()
    found = bar(tmp_path)
    assert found.classes == ["a_b", "c"]
    assert found.notes == [
        "6 not named <class>_<number>.jpg and left out: "
        "train/_3.jpg, train/c.jpg, train/c_.jpg, train/c_1.txt, train/c_x.jpg and 1 more",
        "the classes are not BAR's six: a_b, c",
        "not as many as in BAR as published (in brackets): train has 2 (1,941), test has 2 (654)",
    ]


@pytest.mark.parametrize(
    ("files", "splits", "message"),
    [
        (["train/a_1.jpg"], {}, "{root}: has no folder 'test'; give the folder that holds train and test"),
        (
            ["train/a/1.jpg", "test/a/1.jpg"],
            {},
            "{root}/train: no image named <class>_<number>.jpg, only train/a/; for class folders use the source imagef",
        ),
        (
            ["train/a_1.jpg", "train/b_1.jpg", "test/a_1.jpg"],
            {},
            "{root}/test: empty class: no image of b, which another split has; add images",
        ),
        (["train/a_1.jpg", "test/a_1.jpg"], {}, "{root}: holds the single class 'a'; a classifier needs two"),
        (["train/a_1.jpg"], {"val": None}, "{root}: has no split 'val'; it has train, test"),
        (
            ["train/a_1.jpg"],
            {"train": 1},
            "{root}: is split already (train, test); leave the shares out of --split, or use --hold-out",
        ),
    ],
)
def test_folders_that_are_not_bar(tmp_path: Path, files: list[str], splits: dict[str, Any], message: str) -> None:
    fill(tmp_path, *files)
    with pytest.raises(DataError) as error:
        bar(tmp_path, splits)
    assert str(error.value).startswith(message.format(root=tmp_path))


# Options on the command line


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    parser.add_argument("--split", action="append", default=[])
    parser.add_argument("--hold-out", action="append", default=[])
    parser.add_argument("--long-tail", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-bad", default="stop")
    return parser.parse_args(words)


def test_options_reach_their_source(tmp_path: Path) -> None:
    fill(tmp_path / "images", "a.jpg", "b.jpg")
    table = write(tmp_path / "t.csv", "file,class,part\na.jpg,1,x\nb.jpg,0,x\ngone.jpg,0,x\n")
    classes = write(tmp_path / "classes", "zero\none\n")
    words = ["table", str(table), "--root", str(tmp_path / "images"), "--classes", str(classes)]
    words += ["--path-column", "file", "--label-column", "class"]
    with pytest.raises(DataError, match=r"1 of 3 files are missing: gone\.jpg \(line 4\)"):
        plan_source(parsed(*words))
    found = plan_source(parsed(*words, "--on-bad", "skip"))
    assert names_and_labels(found) == {"train": [("a.jpg", "one"), ("b.jpg", "zero"), ("gone.jpg", "zero")]}
    assert list(plan_source(parsed(*words, "--on-bad", "skip", "--split-column", "part")).splits) == ["x"]
    assert list(plan_source(parsed("digits", "-", "--split", "all")).splits) == ["all"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "-", "--list", "2"], "--list belongs to the source ucf101, not to digits; leave it out"),
        (["imagefolder", "x", "--root", "y"], "--root belongs to the source table, not to imagefolder; leave it out"),
        (["ucf101", "x", "--classes", "y"], "--classes belongs to the source table, not to ucf101; leave it out"),
        (["table", "x", "--lists", "y"], "--lists belongs to the source ucf101, not to table; leave it out"),
    ],
)
def test_options_of_another_source_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(DataError) as error:
        plan_source(parsed(*words))
    assert str(error.value) == message


def test_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["ucf101", "x", "--list", "4"], "argument --list: invalid choice: 4 (choose from 1, 2, 3)"),
        (["cifar100", "x"], "invalid choice: 'cifar100' (choose from"),
    ):
        with pytest.raises(SystemExit) as stop:
            parsed(*words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert f"  {name}\n" in text
        for line in source.help.splitlines():
            assert line in text
        for option in source.options:
            assert option.flag in text
