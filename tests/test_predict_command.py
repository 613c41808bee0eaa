"""`oat-dist predict`: every place where images lie, every format, and names and files that mean harm."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures_run import TinyRun, image_files, tiny_run
from shard_server import ShardServer

from oat_dist import OATClassifier, cli
from oat_dist.commands import index, predict
from oat_dist.inference.sources import Item, find_images, listed
from oat_dist.inference.stream import answer_images
from oat_dist.inference.writers import Ranked, open_writer, printable

__all__ = ["tiny_run"]

Capture = pytest.CaptureFixture[str]
SUMMARY = re.compile(r"(\d[\d,]*) images?, (\d+) of 10 classes, [\d.]+ s, [\d,]+ images/s(?:; (\d+) skipped)?")


@pytest.fixture(scope="module")
def classifier(tiny_run: TinyRun) -> OATClassifier:
    return OATClassifier.from_checkpoint(tiny_run.folder)


@pytest.fixture(scope="module")
def files(tiny_run: TinyRun) -> list[bytes]:
    return image_files(tiny_run.test_split, range(0, 360, 9))


@pytest.fixture
def folder(files: list[bytes], tmp_path: Path) -> Path:
    """Images at several depths, among other things."""
    root = tmp_path / "photos"
    for name, number in {"b.png": 0, "a.PNG": 1, "sub/z.png": 2, "sub/deep/y.png": 3, "other/x.png": 4}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files[number])
    (root / "notes.txt").write_text("left out")
    (root / ".hidden.png").write_bytes(b"left out")
    (root / "sub" / "again").symlink_to(root)  # a loop
    return root


def answered(capsys: Capture, *arguments: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.main(["predict", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# Formats.


def test_csv_and_json_lines_hold_the_answers_exactly(
    tiny_run: TinyRun, classifier: OATClassifier, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    odd = [
        b"plain.png",
        b'comma, "quote".png',
        b"two\nlines.png",
        b"\x1b[31mred.png",
        b"not-utf8-\xff.png",
        "ä日.png".encode(),
    ]
    paths = []
    for number, name in enumerate(odd):
        path = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 - bytes
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(files[number])
        paths.append(os.fsdecode(path))
    labels, probabilities_NC = classifier.predict(files[: len(odd)])
    best_NK = probabilities_NC.sort(dim=1, descending=True)

    out, err = answered(capsys, tiny_run.folder, *paths, "--format", "jsonl", "--top", 3)
    lines = [json.loads(line) for line in out.splitlines()]
    assert out.isascii()
    assert [line["file"] for line in lines] == paths
    for row, line in enumerate(lines):
        assert (line["member"], line["label"]) == (None, labels[row])
        assert line["class"] == classifier.classes[labels[row]]
        assert line["probability"] == pytest.approx(float(probabilities_NC[row, labels[row]]), abs=1e-7)
        assert line["top"][0]["label"] == labels[row]
        assert [one["probability"] for one in line["top"]] == pytest.approx(best_NK.values[row, :3].tolist(), abs=1e-7)
        assert all(one["class"] == classifier.classes[one["label"]] for one in line["top"])
    found = SUMMARY.fullmatch(err.strip())
    assert found is not None
    assert found.groups() == (str(len(odd)), str(len(set(labels))), None)

    out, _ = answered(capsys, tiny_run.folder, *paths, "--format", "csv", "--top", 2)
    assert len(out.splitlines()) == len(odd) + 1
    assert "\x1b" not in out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["file", "member", "class", "probability", "class_2", "probability_2"]
    assert [row["file"] for row in rows] == [printable(path) for path in paths]
    assert rows[1]["file"] == paths[1]
    assert rows[2]["file"].endswith("two\\nlines.png")
    assert rows[3]["file"].endswith("\\x1b[31mred.png")
    assert rows[4]["file"].endswith("not-utf8-\\udcff.png")
    for line, row in zip(lines, rows, strict=True):  # not a digit is lost
        assert (row["class"], float(row["probability"])) == (line["class"], line["probability"])
        assert float(row["probability_2"]) == line["top"][1]["probability"]

    out, _ = answered(capsys, tiny_run.folder, *paths)
    table = [line.split("\t") for line in out.splitlines()]
    assert [line[:2] for line in table] == [[printable(p), line["class"]] for p, line in zip(paths, lines, strict=True)]
    assert [line[2] for line in table] == [f"{line['probability']:.3f}" for line in lines]


def test_a_table_for_a_terminal_and_one_of_few_letters() -> None:
    rows = [(Item("a", None, bytes), [Ranked("cat", 0, 0.5)]), (Item("long", "ä", bytes), [Ranked("d\tg", 1, 1.0)])]
    text = io.StringIO()
    open_writer("table", text, 1, aligned=True).write(rows)
    assert text.getvalue() == "a       cat   0.500\nlong:ä  d\\tg  1.000\n"
    for form in ("table", "csv", "jsonl"):
        raw = io.BytesIO()
        ascii_only = io.TextIOWrapper(raw, "ascii", newline="")
        open_writer(form, ascii_only, 1).write(rows)
        ascii_only.flush()
        assert {"table": b"long:\\xe4\td", "csv": b"long,\\xe4,d", "jsonl": b'"\\u00e4"'}[form] in raw.getvalue()


def test_an_output_file_is_whole_or_not_there(tiny_run: TinyRun, folder: Path, capsys: Capture, tmp_path: Path) -> None:
    output = tmp_path / "answers.csv"
    out, err = answered(capsys, tiny_run.folder, folder, "--output", output)
    assert out == ""
    assert SUMMARY.fullmatch(err.strip())
    assert len(list(csv.DictReader(io.StringIO(output.read_text())))) == 5
    before = output.read_bytes()
    _, err = answered(capsys, tiny_run.folder, tmp_path / "no.png", "--output", output, status=2)
    assert err.splitlines()[-1] == "error: none of the files is an image that can be decoded"
    assert output.read_bytes() == before
    assert list(tmp_path.glob(".*")) == []
    for wrong, message in (
        (tmp_path / "no" / "x.csv", "no such folder to write to"),
        (folder, "a folder; name a file"),
    ):
        _, err = answered(capsys, tiny_run.folder, folder, "--output", wrong, status=2)
        assert err.startswith(f"error: {wrong}: {message}")


# Where images lie.


def names(items: Iterator[Item]) -> list[str]:
    return [item.name for item in items]


def test_folders_in_order(folder: Path) -> None:
    problems: list[str] = []
    expected = ["a.PNG", "b.png", "other/x.png", "sub/z.png", "sub/deep/y.png"]
    assert names(find_images([str(folder)], problems.append)) == [f"{folder}/{name}" for name in expected]
    assert problems == []


def test_lists_of_paths(folder: Path) -> None:
    paths = [f"{folder}/b.png", f"{folder}/sub", "odd\xe9"]
    for separator in ("\n", "\0"):
        for ending in ("", separator):
            data = (separator.join(paths) + ending).encode()
            assert list(listed(io.BytesIO(data))) == paths
    many = [f"{number:06d}.png" for number in range(20_000)]
    assert list(listed(io.BytesIO("\n".join(many).encode()))) == many
    assert list(listed(io.BytesIO(b"a\xff\n"))) == [os.fsdecode(b"a\xff")]
    assert list(listed(io.BytesIO(b"two\nlines\0b\0"))) == ["two\nlines", "b"]


def test_packed_splits_and_their_tars_agree_with_evaluate(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    expected = json.loads((tiny_run.folder / "evaluation.json").read_text())["protocols"]["stored"]["correct"]
    shards = tiny_run.test_split
    output = tmp_path / "answers.jsonl"
    answered(capsys, tiny_run.folder, tiny_run.data / "test", "--output", output, "--batch-size", 100)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["member"] for line in lines] == [shards.index.name(number) for number in range(len(shards))]
    assert sum(int(line["label"] == label) for line, label in zip(lines, shards.index.label, strict=True)) == expected
    (tar,) = (tiny_run.data / "test").glob("*.tar")
    answered(capsys, tiny_run.folder, tar, "--output", output, "--batch-size", 7)
    from_tar = {line["member"]: line["label"] for line in map(json.loads, output.read_text().splitlines())}
    assert from_tar == {
        f"{number:0{len(next(iter(from_tar))) - 4}d}.png": line["label"] for number, line in enumerate(lines)
    }


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_names_inside_tars_never_become_paths(
    tiny_run: TinyRun, files: list[bytes], capsys: Capture, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "in").mkdir()
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"untouched")
    hostile = [
        "../victim.png",
        str(victim),
        "a/../../b.png",
        "line\nbreak.png",
        "\x1b[2J.png",
        "C:\\x.jpg",
        "x" * 300 + ".png",
    ]
    members = dict(zip(hostile, files, strict=False)) | {
        "notes.txt": b"no image",
        "._x.png": b"no image",
        "bad.png": b"x",
    }
    mode = "w" if ending == "tar" else f"w:{ending[4:]}"
    path = write_tar(tmp_path / "in" / f"set.{ending}", members, mode)
    before = sorted(tmp_path.rglob("*"))
    out, err = answered(capsys, tiny_run.folder, path, "--format", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["member"] for line in lines] == hostile
    assert {line["file"] for line in lines} == {str(path)}
    assert err.startswith(f"skipped: {path}:bad.png: not an image that can be decoded: ")
    out, _ = answered(capsys, tiny_run.folder, path)
    assert out.splitlines()[3].startswith(f"{path}:line\\nbreak.png\t")
    assert "\x1b" not in out
    assert sorted(tmp_path.rglob("*")) == before
    assert victim.read_bytes() == b"untouched"


def test_a_damaged_tar_gives_what_comes_before_the_damage(
    tiny_run: TinyRun, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": file for number, file in enumerate(files[:4])})
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 100])
    out, err = answered(capsys, tiny_run.folder, path)
    assert len(out.splitlines()) == 3
    assert err.startswith(f"skipped: {path}: cut short")
    packed = write_tar(tmp_path / "b.tar.gz", {f"{number}.png": file for number, file in enumerate(files)}, "w:gz")
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    out, err = answered(capsys, tiny_run.folder, packed)
    assert 10 <= len(out.splitlines()) <= 30
    assert err.startswith(f"skipped: {packed}: Compressed file ended before the end-of-stream marker was reached")


def test_what_cannot_be_read_is_listed_and_left_out(
    tiny_run: TinyRun, folder: Path, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    (folder / "bad.png").write_bytes(files[0][:40])
    (folder / "empty.jpg").touch()
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "fake.tar").write_bytes(b"no tar")
    inputs = [folder, tmp_path / "no.png", tmp_path / "nothing", tmp_path / "pipe.png", tmp_path / "fake.tar"]
    out, err = answered(capsys, tiny_run.folder, *inputs)
    assert len(out.splitlines()) == 5
    *skipped, summary = err.splitlines()
    found = SUMMARY.fullmatch(summary)
    assert found is not None
    assert (found[1], found[3]) == ("5", "7")
    for text in (
        f"{folder}/bad.png: not an image that can be decoded: ",
        f"{folder}/dangling.png: cannot be read (No such file or directory)",
        f"{folder}/empty.jpg: not an image that can be decoded: the file is empty",
        f"{tmp_path}/no.png: cannot be read (No such file or directory)",
        f"{tmp_path}/nothing: holds no images",
        f"{tmp_path}/pipe.png: cannot be read (not a regular file)",
        f"{tmp_path}/fake.tar: cut short",
    ):
        assert any(line.startswith(f"skipped: {text}") for line in skipped), text
    _, err = answered(capsys, tiny_run.folder, tmp_path / "nothing", status=2)
    assert err.splitlines() == [
        f"skipped: {tmp_path}/nothing: holds no images",
        "error: none of the files is an image that can be decoded",
    ]


def test_only_so_many_problems_are_listed(
    tiny_run: TinyRun, files: list[bytes], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_MOST_LISTED", 3)
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": b"x" for number in range(10)} | {"x.png": files[0]})
    _, err = answered(capsys, tiny_run.folder, path)
    assert [line[:8] for line in err.splitlines()[:3]] == ["skipped:"] * 3
    assert err.splitlines()[3] == "skipped: and 7 more"
    assert err.splitlines()[4].endswith("; 10 skipped")


# Order, company and memory.


def test_order_and_company(
    tiny_run: TinyRun, classifier: OATClassifier, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number:02d}.png": file for number, file in enumerate(files)})
    outputs = [
        answered(capsys, tiny_run.folder, path, "--batch-size", size, "--format", "csv")[0] for size in (1, 7, 64)
    ]
    rows = [list(csv.DictReader(io.StringIO(text))) for text in outputs]
    for other in rows[1:]:
        assert [row["class"] for row in other] == [row["class"] for row in rows[0]]
        for one, two in zip(rows[0], other, strict=True):
            assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=1e-6)
    assert [row["member"] for row in rows[0]] == [f"{number:02d}.png" for number in range(len(files))]
    single, _ = answered(capsys, tiny_run.folder, path, "--protocol", "single", "--format", "jsonl")
    assert [json.loads(line)["label"] for line in single.splitlines()] == classifier.predict(files, "single")[0]
    groups, _ = answered(capsys, tiny_run.folder, path, "--protocol", "batch", "--format", "jsonl", "--batch-size", 5)
    expected = classifier.predict(files[:32], "batch")[0] + classifier.predict(files[32:], "batch")[0]
    assert [json.loads(line)["label"] for line in groups.splitlines()] == expected


def test_little_waits_in_memory(classifier: OATClassifier, files: list[bytes]) -> None:
    """Of an endless source, no more is taken than a batch and what the threads have at hand."""
    taken = 0

    def endless() -> Iterator[Item]:
        nonlocal taken
        while True:
            taken += 1
            yield Item("tar", str(taken), lambda: files[0], len(files[0]))

    stream = answer_images(classifier, endless(), lambda text: None, batch_size=16, workers=2)
    for number in range(1, 40):
        assert [item.member for item, _ in next(stream)] == [str(n) for n in range(16 * number - 15, 16 * number + 1)]
        assert taken <= 16 * number + 16 + 8 * 6
    stream.close()


def test_options_that_cannot_be(tiny_run: TinyRun, folder: Path, capsys: Capture) -> None:
    for options, message in (
        (["--prior", "balanced"], "this model was trained with anchor.center=probabilities"),
        (["--calibrated"], "not calibrated"),
        (["--checkpoint", "newest"], "--checkpoint newest: must be latest, best or step-<n>"),
        (["--device", "gpu"], "--device gpu: "),
        (["--device", "cuda:99"], "--device cuda:99: this machine has "),
    ):
        out, err = answered(capsys, tiny_run.folder, folder, *options, status=2)
        assert out == ""
        assert re.fullmatch(r"error: [^\n]*\n", err)
        assert message in err
    first = answered(capsys, tiny_run.folder, folder, "--checkpoint", f"step-{tiny_run.steps[0]}")[0]
    assert first == answered(capsys, tiny_run.pretrained, folder)[0]
    assert first != answered(capsys, tiny_run.folder, folder)[0]


def test_a_list_on_stdin(tiny_run: TinyRun, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answered(capsys, tiny_run.folder, folder)
    paths = [line.split("\t")[0] for line in expected.splitlines()]
    for separator in ("\n", "\0"):
        data = io.BytesIO((separator.join(paths) + separator).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
        assert answered(capsys, tiny_run.folder, "-")[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(str(folder).encode())))
    assert answered(capsys, tiny_run.folder, "-", paths[0])[0] == expected + expected.splitlines(keepends=True)[0]


def test_the_answers_of_one_pass_are_those_of_the_classifier(classifier: OATClassifier, files: list[bytes]) -> None:
    prepared = np.stack([classifier.prepare(file) for file in files])
    answers = classifier.answer(prepared)
    labels, probabilities_NC = classifier.predict(files)
    assert answers.labels_B.tolist() == labels
    assert float((answers.probabilities_BC - probabilities_NC).abs().max()) < 1e-6


def test_an_output_keeps_links_and_devices(tiny_run: TinyRun, folder: Path, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    (tmp_path / "target.csv").write_text("older")
    answered(capsys, tiny_run.folder, folder / "b.png", "--output", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text().startswith("file,member,class")
    null = Path("/dev/null").stat()
    answered(capsys, tiny_run.folder, folder / "b.png", "--output", "/dev/null")
    assert (Path("/dev/null").stat().st_rdev, Path("/dev/null").is_char_device()) == (null.st_rdev, True)


def test_a_pipe_named_like_a_tar_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "x.tar")
    problems: list[str] = []
    found = list(find_images([str(folder)], problems.append))
    assert len(found) == 5
    assert problems == [f"{folder}/x.tar: not a regular file"]


def test_every_image_of_a_remote_split_is_answered(
    tiny_run: TinyRun, classifier: OATClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shards are still being fetched when the last name is known."""
    with ShardServer(tiny_run.data) as server:
        monkeypatch.setenv("OAT_DIST_CACHE", str(tmp_path / "cache"))
        url, theirs = f"{server.url}/test/test-000000.tar", str(tmp_path / "theirs")
        assert index.main([url, "--output", theirs, "--split", "test", "--label", "cls", "--workers", "1"]) == 0
        problems: list[str] = []
        items = find_images([f"{theirs}/test"], problems.append)
        answers = [one for batch in answer_images(classifier, items, problems.append) for one in batch]
    assert problems == []
    assert len(answers) == tiny_run.test_split.num_samples
