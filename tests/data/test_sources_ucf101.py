"""UCF-101 and ERA as published: lists with their traps, missing and broken videos, middle frames in the shards."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_video import number_shown, write_video

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES, PackPlan
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

CLASSES = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
# class, name in the file, group, clip, frames: the class of the second is written in another way in the file
VIDEOS = [
    (label, f"v_{text}_g{group:02d}_c{clip:02d}.avi", 3 + 7 * k + group + clip)
    for k, (label, text) in enumerate(zip(CLASSES, ("ApplyEyeMakeup", "HandStandPushups", "YoYo"), strict=True))
    for group in (1, 2)
    for clip in (1, 2)
]
TRAIN = "".join(f"{label}/{name} {CLASSES.index(label) + 1}\r\n" for label, name, _ in VIDEOS if "_g02" in name)
TEST = "".join(f"{label}/{name}\r\n" for label, name, _ in VIDEOS if "_g01" in name)
CLASS_LINES = "".join(f"{k} {name}\r\n" for k, name in enumerate(CLASSES, 1))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF-101 in small, without lists. Read only."""
    root = tmp_path_factory.mktemp("ucf101")
    for label, name, count in VIDEOS:
        write_video(root / "UCF-101" / label / name, count)
    return root


def write_lists(folder: Path, **changes: str) -> Path:
    """The official lists; list 2 is list 1 the other way round, without Windows line ends."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "classInd": CLASS_LINES,
        "trainlist01": TRAIN,
        "testlist01": TEST,
        "trainlist02": "".join(f"{line} {CLASSES.index(line.split('/')[0]) + 1}\n" for line in TEST.splitlines()),
        "testlist02": "".join(f"{line.split()[0]}\n" for line in TRAIN.splitlines()),
        **changes,
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def plan(root: Path, splits: dict[str, Any] | None = None, **settings: Any) -> PackPlan:
    return SOURCES["ucf101"](str(root), splits=splits or {}, seed=0, **settings)


def shown(shards: ShardSet) -> dict[str, tuple[str, int]]:
    """Class and number of the frame that was packed, by name."""
    with contextlib.closing(ShardReader(shards)) as reader:
        return {
            shards.index.name(i): (shards.classes[shards.index.label[i]], number_shown(decode_rgb(reader.read(i))))
            for i in range(len(shards))
        }


def test_the_middle_frame_of_every_listed_video(videos: Path, tmp_path: Path) -> None:
    found = plan(videos, lists=str(write_lists(tmp_path / "lists")))
    assert found.classes == CLASSES and found.notes == [] and found.source == "ucf101"
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, source=found.source)
    for split, group in (("train", "_g02"), ("test", "_g01")):
        expected = {f"{label}/{name}": (label, count // 2) for label, name, count in VIDEOS if group in name}
        assert shown(packed[split]) == expected and len(expected) == 6
    assert {count % 2 for _, _, count in VIDEOS} == {0, 1}


def test_where_lists_and_videos_may_lie(videos: Path, tmp_path: Path) -> None:
    lists = str(write_lists(tmp_path / "lists"))
    expected = {split: [s[:2] for s in part] for split, part in plan(videos, lists=lists).splits.items()}
    root = tmp_path / "root"
    root.mkdir()
    (root / "UCF-101").symlink_to(videos / "UCF-101")
    write_lists(root / "ucfTrainTestlist")
    for place in (root, root / "UCF-101"):  # the second: the class folders themselves
        if place.name == "UCF-101":
            (root / "UCF-101").unlink()
            (root / "UCF-101").mkdir()
            for label in CLASSES:  # a copy made where case does not matter
                (place / label.lower()).symlink_to(videos / "UCF-101" / label)
        found = plan(place)
        assert {split: [s[:2] for s in part] for split, part in found.splits.items()} == expected
    second = plan(videos, lists=lists, list_number=2)
    assert [s.name for s in second.splits["train"]] == [name for name, _ in expected["test"]]
    assert list(plan(videos, {"test": None}, lists=lists).splits) == ["test"]


def test_missing_videos_stop_at_once_or_are_skipped(videos: Path, tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists")
    gone = [f"YoYo/v_YoYo_g{group:02d}_c09.avi" for group in range(3, 10)]
    (lists / "trainlist01.txt").write_text(TRAIN + "".join(f"{name} 3\n" for name in gone))
    missing = f"7 of the 19 videos of list 1 are missing: {', '.join(gone[:5])} and 2 more"
    with pytest.raises(DataError) as error:
        plan(videos, lists=str(lists))
    assert str(error.value) == f"{videos}/UCF-101: {missing}; get them, or leave them out with --on-bad skip"
    found = plan(videos, lists=str(lists), on_bad="skip")
    assert found.notes == [missing]
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, on_bad="skip")
    assert len(packed["train"]) == 6
    assert packed["train"].manifest.skipped == [{"name": name, "reason": "No such file or directory"} for name in gone]
    with pytest.raises(DataError, match=r"12 of the 12 videos of list 1 are missing: .* and 7 more; check the path"):
        plan(tmp_path, lists=str(write_lists(tmp_path / "again")), on_bad="skip")


def test_a_broken_video_stops_the_packer_or_is_skipped(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    for label, name, _ in VIDEOS:
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / name).write_bytes((videos / "UCF-101" / label / name).read_bytes())
    broken = root / "YoYo/v_YoYo_g02_c02.avi"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-10])
    found = plan(root, lists=str(write_lists(tmp_path / "lists")))
    reason = f"cut short: {len(whole) - 10:,} of {len(whole):,} bytes are there; fetch the video again"
    with pytest.raises(DataError, match=r"v_YoYo_g02_c02\.avi") as error:
        write_splits(found.splits, tmp_path / "out", classes=found.classes)
    assert reason in str(error.value)
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes, on_bad="skip")
    assert packed["train"].manifest.skipped == [{"name": "YoYo/v_YoYo_g02_c02.avi", "reason": reason}]


LISTS: list[tuple[dict[str, str], str]] = [
    ({"classInd": "1 A\n3 B\n"}, "classInd.txt: line 2: '3 B' is not the number 2 and a new class; fetch the official"),
    ({"classInd": "1 A\n2 A\n"}, "classInd.txt: line 2: '2 A' is not the number 2 and a new class"),
    ({"classInd": "ApplyEyeMakeup\n"}, "classInd.txt: line 1: 'ApplyEyeMakeup' is not the number 1 and a new class"),
    ({"classInd": "\n"}, "classInd.txt: lists 0 classes; fetch the official lists again"),
    (
        {"trainlist01": "YoYo v_YoYo_g01_c01.avi"},
        "trainlist01.txt: line 1: 'YoYo v_YoYo_g01_c01.avi' is not of the form",
    ),
    ({"trainlist01": "../YoYo/v_x.avi 1"}, "trainlist01.txt: line 1: '../YoYo/v_x.avi 1' is not of the form"),
    ({"trainlist01": "\r\nYolo/v_x.avi 1"}, "trainlist01.txt: line 2: 'Yolo' is not in classInd.txt; fetch the lists"),
    (
        {"trainlist01": "YoYo/v_YoYo_g01_c01.avi 2"},
        "trainlist01.txt: line 1: gives YoYo/v_YoYo_g01_c01.avi the number 2, but classInd.txt says 3; take both files",
    ),
    (
        {"testlist01": "YoYo/v_x.avi\nYoYo/v_y.avi\nYoYo/v_x.avi\n"},
        "testlist01.txt: line 3: YoYo/v_x.avi is listed before, in line 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), LISTS)
def test_faulty_lists(videos: Path, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as error:
        plan(videos, lists=str(write_lists(tmp_path, **changes)))
    assert str(error.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(error.value)


def test_missing_lists_and_splits(videos: Path, tmp_path: Path) -> None:
    lists = str(write_lists(tmp_path / "lists"))
    for settings, message in (
        ({}, f"{videos}/ucfTrainTestlist: no classInd.txt there, nor in {videos}; unpack UCF101TrainTestSplits"),
        ({"lists": str(tmp_path)}, f"{tmp_path}/classInd.txt: no such list; it comes with UCF101TrainTestSplits"),
        ({"lists": lists, "list_number": 3}, f"{lists}/trainlist03.txt: no such list; it comes with"),
        ({"lists": lists, "splits": {"train": 1}}, f"{lists}: is split already (train, test); leave the shares out"),
        ({"lists": lists, "splits": {"val": None}}, f"{lists}: has no split 'val'; it has train, test"),
    ):
        with pytest.raises(DataError) as error:
            plan(videos, **settings)
        assert str(error.value).startswith(message)
    (tmp_path / "lists/classInd.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(DataError, match=r"classInd\.txt: is no text; fetch the official lists again"):
        plan(videos, lists=lists)


def test_leaks_between_the_lists_are_named(videos: Path, tmp_path: Path) -> None:
    group = "YoYo/v_YoYo_g01_c02.avi"
    lists = write_lists(tmp_path, testlist01=TEST.replace(f"{group}\r\n", ""), trainlist01=f"{TRAIN}{group} 3\r\n")
    assert plan(videos, lists=str(lists)).notes == [
        "leak: 1 groups (cut from one recording) are in the train list and in the test list: YoYo g01"
    ]
    write_lists(tmp_path, trainlist01=f"{TRAIN}{group} 3\r\n")
    assert plan(videos, lists=str(lists)).notes == [
        f"leak: 1 videos are in the train list and in the test list: {group}"
    ]


OFFICIAL = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}


@pytest.mark.parametrize("number", OFFICIAL)
def test_official_lists_and_real_videos(tmp_path: Path, number: int) -> None:
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip("needs ucf101/*.txt and two videos in the folder named by OAT_TEST_DATA")
    data = Path(folder) / "ucf101"
    for name in ("v_ApplyEyeMakeup_g01_c01.avi", "v_BaseballPitch_g01_c01.avi"):
        (tmp_path / "UCF-101" / name.split("_")[1]).mkdir(parents=True)
        (tmp_path / "UCF-101" / name.split("_")[1] / name).symlink_to(data / name)
    found = plan(tmp_path, lists=str(data), list_number=number, on_bad="skip")
    train, test = found.splits["train"], found.splits["test"]
    assert (len(train), len(test)) == OFFICIAL[number] and len(found.classes) == 101
    assert found.classes[0] == "ApplyEyeMakeup" and found.classes[36] == "HandstandPushups"
    assert {s.label for s in train} == {s.label for s in test} == set(found.classes)
    (note,) = found.notes  # no leak
    assert note.startswith(f"13,318 of the 13,320 videos of list {number} are missing: ")
    if number == 1:
        with pytest.raises(DataError, match=r"13,318 of the 13,320 .* leave them out with --on-bad skip"):
            plan(tmp_path, lists=str(data))
    by_name = {s.name: s for s in (*train, *test)}
    handstand = by_name["HandstandPushups/v_HandStandPushups_g01_c01.avi"]
    assert handstand.label == "HandstandPushups"
    real = by_name["BaseballPitch/v_BaseballPitch_g01_c01.avi"].data
    assert callable(real) and decode_rgb(real()).shape == (240, 320, 3)


# ERA


def era(root: Path, splits: dict[str, Any] | None = None) -> PackPlan:
    return SOURCES["era"](str(root), splits=splits or {}, seed=0)


def test_era(tmp_path: Path) -> None:
    names = {
        f"{split}/{label}/{label}_{i:03d}.mp4": (label, 4 + i + len(label))
        for split in ("Train", "Test")
        for label in ("fire", "post-earthquake")
        for i in (0, 1)
    }
    for name, (_, count) in names.items():
        write_video(tmp_path / "in" / name, count, codec="libx264")
    (tmp_path / "in/Train/readme.txt").write_text("x")
    found = era(tmp_path / "in")
    assert found.source == "era" and found.notes == [
        "1 not a video and left out: Train/readme.txt",
        "2 classes; ERA as published has 25",
        "not as many as in ERA as published (in brackets): train has 4 (1,473), test has 4 (1,391)",
    ]
    packed = write_splits(found.splits, tmp_path / "out", classes=found.classes)
    everything = {**shown(packed["train"]), **shown(packed["test"])}
    assert everything == {name: (label, count // 2) for name, (label, count) in names.items()}
    assert list(era(tmp_path / "in", {"test": None}).splits) == ["test"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.mp4", "b/1.mp4"], "{root}: holds no folders Train and Test; give the folder that holds the two"),
        (["Train/a/1.mp4", "Train/b/1.mp4"], "{root}: holds no folders Train and Test"),
        (["Train/a/1.mp4", "Test/b/1.mp4"], "{root}/Train/b: empty class: split 'train' lacks a class that another"),
        (["Train/a/1.mp4", "Train/1.mp4", "Test/a/1.mp4"], "{root}/Train: the video '1.mp4' lies in no class folder"),
        (["Train/a/1.jpg", "Test/a/1.mp4"], "{root}/Train/a: empty class: no video in this folder; add videos"),
    ],
)
def test_folders_that_are_not_era(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        era(tmp_path)
    assert str(error.value).startswith(message.format(root=tmp_path))


def test_videos_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for source in ("ucf101", "era"):
        with pytest.raises(DataError, match=r"run: pip install 'oat_dist\[video\]'"):
            SOURCES[source](str(tmp_path), splits={}, seed=0)
