"""inspect: the numbers, the pictures as they are drawn, and nothing replaced unasked."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import picture, shard_writer
from PIL import Image
from shard_server import ShardServer

from oat_dist import cli
from oat_dist.commands import inspect
from oat_dist.data.columns import count_values, low_median_high
from oat_dist.data.foreign.write_index import index_shards
from oat_dist.data.index import open_split
from oat_dist.data.integrity.inspection import choose_samples, format_counts
from oat_dist.data.integrity.pictures import balance_png, sheet_png
from oat_dist.data.packing import write_splits
from oat_dist.data.packing.samples import Sample

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train: 7 of a, 2 of b, one colour each; val: one of each. Read only."""

    def plain(k: int, size: tuple[int, int], kind: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, (20 * k, 100, 50)).save(file, kind)
        return file.getvalue()

    train = [Sample(f"{k}", "a" if k < 7 else "b", plain(k, (8 + k, 16), "PNG" if k else "BMP")) for k in range(9)]
    folder = tmp_path_factory.mktemp("inspected") / "set"
    write_splits({"train": train, "val": train[6:8]}, folder, source="paint")
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_numbers(packed: Path, capsys: Capture) -> None:
    assert inspect.main([str(packed), "--split", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (packed / "train/train-000000.tar").stat().st_size
    assert lines[0] == f"train: 9 images of 2 classes, {packed}/train"
    values = {line[:18].strip(): line[18:].split() for line in lines[1:7]}
    assert values == {
        "": ["least", "median", "most"],
        "images a class": ["2", "2", "7"],
        "width, pixels": ["8", "12", "16"],
        "height, pixels": ["16", "16", "16"],
        "width / height": ["0.50", "0.75", "1.00"],
        "bytes an image": [f"{v:,}" for v in low_median_high(open_split(packed / "train").index.length)],
    }
    assert lines[8:] == [
        f"  1 shard (beside the index), {size:,} bytes; source: paint",
        "  classes:",
        "    a  7  77.8 %",
        "    b  2  22.2 %",
        f"pictures: oat-dist inspect {packed} --output FOLDER",
    ]


def test_pictures(packed: Path, tmp_path: Path, capsys: Capture) -> None:
    look = tmp_path / "new/look"
    assert cli.main(["inspect", str(packed), "--output", str(look), "--samples", "6"]) == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in look.iterdir()) == [
        "train-classes.png",
        "train-samples.png",
        "val-classes.png",
        "val-samples.png",
    ]
    assert f"  {look}/train-classes.png\n  formats of 5 samples: " in text
    # three of a and both of b, each enlarged as it is: every colour drawn is one of the data's
    sheet = pixels(look / "train-samples.png")
    drawn = {k for k in range(9) if (sheet == (20 * k, 100, 50)).all(axis=2).sum() >= 8 * 16}
    assert len(drawn) == 5 and {7, 8} < drawn
    assert pixels(look / "train-classes.png").shape[1] == 1200
    before = (look / "train-samples.png").read_bytes()

    assert inspect.main([str(packed), "--output", str(look)]) == 2
    assert capsys.readouterr().err == (
        f"error: {look}/train-samples.png: already exists; choose another name, or replace it: --overwrite\n"
    )
    assert (look / "train-samples.png").read_bytes() == before
    same = ["inspect", str(packed / "train"), "--samples", "6", "--output"]
    assert cli.main([*same, str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes() == before
    assert cli.main([*same, str(tmp_path / "one.png"), "--seed", "3", "--overwrite"]) == 0
    assert (tmp_path / "one.png").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one.png"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["SET", "--output", "a.png"],
            "a.png: one file for the splits train, val; choose one with --split, or give a folder",
        ),
        (["SET", "--output", "a.jpg"], "a.jpg: pictures are written as .png; give a FILE.png or a folder"),
        (["SET", "--output", "file"], "file: a file is in the way; choose another folder"),
        (["SET/val", "--output", "folder.png"], "folder.png: a folder is in the way; choose another name"),
        (["SET", "--split", "test"], "SET: has no split 'test'; there are train, val"),
        (["SET", "--samples", "2001"], "--samples 2,001: too many for a picture; give 2,000 or fewer"),
        (["SET", "--seed", "-1"], "--seed -1 is below 0; give a whole number from 0 on"),
        (["none"], "none: no such folder; give what pack or index was given as OUTPUT, or one split in it"),
        (["."], ".: holds no packed split; pack a data set first (shards/pack.py)"),
    ],
)
def test_refusals(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    given = [argument.replace("SET", str(packed)) for argument in arguments]
    assert inspect.main(given) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {text.replace('SET', str(packed))}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
def test_samples_that_are_no_number(packed: Path, capsys: Capture, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        inspect.main([str(packed), f"--samples={value}"])
    assert ended.value.code == 2 and f"{value!r} is not a whole number of at least 1" in capsys.readouterr().err


def test_which_samples_are_shown(digits_like: Path) -> None:
    shards = open_split(digits_like)
    label = shards.index.label
    for count, seed in ((30, 0), (30, 1), (7, 0), (1, 0)):
        choice = choose_samples(shards, count, seed)
        assert choice == choose_samples(shards, count, seed) and choice.shards is None
        assert len(set(choice.ids)) == len(choice.ids) <= count
        shown = label[choice.ids].tolist()
        assert shown == sorted(shown)
        if count == 30:
            assert [shown.count(k) for k in range(10)] == [3] * 9 + [1]  # the last class has but one
        else:
            assert len(set(shown)) == len(shown) == count
    assert choose_samples(shards, 30, 0).ids != choose_samples(shards, 30, 1).ids


@pytest.fixture(scope="module")
def digits_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine classes of four images and one of a single one, in a folder of one split. Read only."""
    samples = [Sample(f"{k:02d}", f"class {k // 4}", picture(k, "PNG", (4, 4))) for k in range(37)]
    folder = tmp_path_factory.mktemp("digits-like")
    write_splits({"s": samples}, folder)
    return folder / "s"


def test_remote_shards_are_drawn_from_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OAT_DIST_CACHE", str(tmp_path / "cache"))
    shard_writer(tmp_path / "shards", count=12, each=3)
    with ShardServer(tmp_path) as server:
        index_shards([f"{server.url}/shards/s-{{000000..000003}}.tar"], tmp_path / "far")
        server.requests.clear()
        assert inspect.main([str(tmp_path / "far/train"), "--output", str(tmp_path / "a.png")]) == 0
        assert sorted(server.requests.values()) == [1, 1]
    text = capsys.readouterr().out
    assert "  4 shards (4 of them remote), " in text and "formats of 6 samples from 2 of 4 shards: 6 jpg" in text


def test_unreadable_samples_are_shown_as_such(tmp_path: Path, capsys: Capture) -> None:
    write_splits({"s": [Sample("0", "x", picture(0)), Sample("1", "x", picture(1))]}, tmp_path / "set")
    index = open_split(tmp_path / "set/s").index
    with (tmp_path / "set/s/s-000000.tar").open("r+b") as file:
        file.seek(int(index.offset[0]))
        file.write(bytes(100))
    assert inspect.main([str(tmp_path / "set/s"), "--output", str(tmp_path / "a.png")]) == 0
    assert "formats of 2 samples: 1 unreadable, 1 jpg" in capsys.readouterr().out


def test_charts_of_any_number_of_classes() -> None:
    sizes = {}
    for count in (2, 20, 1000):
        counts = np.random.default_rng(count).integers(0, 2000, count).tolist()
        names = [f"a class with quite a long name, number {k}, 猫 and $x_1$" for k in range(count)]
        data = balance_png("title", names, counts)
        sizes[count] = Image.open(io.BytesIO(data)).size
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(data)).convert("L")))) > 20
    assert {width for width, _ in sizes.values()} == {1200} and sizes[2][1] < sizes[1000][1] < sizes[20][1] < 1000
    assert balance_png("no image at all", ["a"], [0]) == balance_png("no image at all", ["a"], [0])


def test_sheets_keep_classes_together() -> None:
    def sheet(captions: str) -> np.ndarray:
        images = [np.full((96, 96, 3), 10 * ord(c) % 251, np.uint8) for c in captions]
        return np.asarray(Image.open(io.BytesIO(sheet_png("", images, list(captions)))))

    assert sheet("a").shape == (24 + 44 + 96 + 22 + 24, 24 + 96 + 24, 3)
    width = 13  # of the images that fit side by side
    assert sheet("a" * width).shape[0] == sheet("aaab").shape[0] < sheet("a" * (width + 1)).shape[0]
    assert sheet("a" * 14).shape == sheet("a" * 7 + "b" * 7).shape  # two rows of seven, both times


def test_many_classes_in_text() -> None:
    lines = list(format_counts([f"c{k}" for k in range(100)], [100 - k for k in range(99)] + [0]))
    assert lines[0] == "  largest classes, of 100:" and lines[1].split() == ["c0", "100", "2.0", "%"]
    assert lines[9] == "  smallest classes:" and lines[17].split() == ["c99", "0", "0.0", "%"]
    assert lines[18:] == ["  1 classes have no image"]


def test_columns_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oat_dist.data.columns._PIECE", 7)
    random = np.random.default_rng(0)
    for count in (1, 6, 7, 8, 50):
        column = random.integers(0, 9, count).astype(np.uint32)
        middle = sorted(column.tolist())[(count - 1) // 2]
        assert low_median_high(column) == (column.min(), middle, column.max())
        assert low_median_high(column * 10**7) == (column.min() * 10**7, middle * 10**7, column.max() * 10**7)
        assert count_values(column, 5).tolist() == [(column == k).sum() for k in range(5)]
    assert count_values(np.array([-1, 2, 3, 2]), 3).tolist() == [0, 0, 2]


def test_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        inspect.main(["--help"])
    assert "inspect packed/cifar10 --output look" in capsys.readouterr().out
