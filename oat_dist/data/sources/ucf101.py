"""UCF-101 (Soomro et al., 2012): the middle frame of every video, split by one of the three official lists.

What the lists hold: `classInd.txt` numbers the classes from 1; a line of `trainlist0N.txt` is `class/video number`,
one of `testlist0N.txt` only `class/video`. Some have Windows line ends. The class is the folder's name: videos of
`HandstandPushups` are called `v_HandStandPushups_*`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from oat_dist.data.images.video import middle_frame_png, require_video_decoder
from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources.folders import input_folder
from oat_dist.data.sources.splits import PackPlan, SplitRequest, chosen_splits, list_some
from oat_dist.errors import DataError

__all__ = ["HELP", "plan_ucf101"]

HELP = """\
INPUT holds UCF-101/<class>/v_*.avi as published, or the class folders themselves; the official lists
(classInd.txt, trainlist01.txt, ...) lie in INPUT/ucfTrainTestlist, in INPUT, or where --lists says;
the middle frame of each video is packed, as PNG (needs: pip install 'oat_dist[video]')"""

_VIDEOS_FOLDER, _LISTS_FOLDER = "UCF-101", "ucfTrainTestlist"
_CLASS_LINE = re.compile(r"([0-9]+)\s+([^/\\\s]+)")
_VIDEO_LINE = re.compile(r"([^/\\\s]+)/([^/\\\s]+\.avi)(?:\s+([0-9]+))?", re.IGNORECASE)
_GROUP = re.compile(r"_(g[0-9]+)_c[0-9]+\.avi", re.IGNORECASE)


@dataclass(frozen=True)
class _Listed:
    """One line of a train or test list."""

    label: str
    video: str

    @property
    def name(self) -> str:
        return f"{self.label}/{self.video}"

    @property
    def group(self) -> str | None:
        """Videos of a group are cut from one recording: a group in both splits is a leak."""
        match = _GROUP.search(self.video)
        return f"{self.label} {match[1]}" if match else None


def plan_ucf101(
    input: str,
    *,
    splits: SplitRequest,
    seed: int,
    list_number: int | None = None,
    lists: str | None = None,
    on_bad: str = "stop",
) -> PackPlan:
    """The videos of one official list (1, 2 or 3; default 1); their middle frames are read only when packed.

    Args:
        lists: folder of the official lists. Default: looked for in and beside `input`.
        on_bad: "stop": a listed video that is not there is an error now; "skip": one that the packer skips and lists.

    Raises:
        DataError: PyAV is missing, lists or videos are missing, a list with a faulty line.
    """
    require_video_decoder()
    root = input_folder(input)
    videos = root / _VIDEOS_FOLDER if (root / _VIDEOS_FOLDER).is_dir() else root
    folder = Path(lists) if lists is not None else _find_lists(root)
    classes = _read_classes(folder / "classInd.txt")
    number = list_number or 1
    both = {name: _read_list(folder / f"{name}list{number:02d}.txt", classes) for name in ("train", "test")}
    listed = {name: both[name] for name in chosen_splits(folder, both, splits)}

    there = _Videos(videos)
    paths = {one.name: there.find(one) for part in listed.values() for one in part}
    missing = [name for name, path in paths.items() if not path.is_file()]
    wanted = f"{len(paths):,} videos of list {number}"
    if missing and (on_bad == "stop" or len(missing) == len(paths)):
        raise DataError(
            f"{videos}: {len(missing):,} of the {wanted} are missing: {list_some(missing)}; "
            + ("get them, or leave them out with --on-bad skip" if len(missing) < len(paths) else "check the path")
        )
    planned = {
        name: [Sample(one.name, one.label, functools.partial(middle_frame_png, paths[one.name])) for one in part]
        for name, part in listed.items()
    }
    return PackPlan("ucf101", classes, planned, _notes(both, missing, wanted))


def _notes(both: dict[str, list[_Listed]], missing: list[str], wanted: str) -> list[str]:
    notes = [f"{len(missing):,} of the {wanted} are missing: {list_some(missing)}"] if missing else []
    names = [{one.name for one in part} for part in both.values()]
    groups = [{one.group for one in part if one.group} for part in both.values()]
    for what, (train, test) in (("videos", names), ("groups (cut from one recording)", groups)):
        shared = sorted(train & test)
        if shared:
            notes.append(
                f"leak: {len(shared):,} {what} are in the train list and in the test list: {list_some(shared)}"
            )
            break
    return notes


def _find_lists(root: Path) -> Path:
    places = [root / _LISTS_FOLDER, root, root.resolve().parent / _LISTS_FOLDER]
    for folder in places:
        if (folder / "classInd.txt").is_file():
            return folder
    raise DataError(
        f"{places[0]}: no classInd.txt there, nor in {root}; unpack UCF101TrainTestSplits-RecognitionTask.zip there, "
        "or say where the official lists are with --lists FOLDER"
    )


class _Videos:
    """The files below the class folders, found whatever the case of their names: copies differ in that."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, listed: _Listed) -> Path:
        """Where the video lies, or should lie."""
        return self._below(self._below(self._root, listed.label), listed.video)

    def _below(self, folder: Path, name: str) -> Path:
        if folder not in self._listings:
            try:
                names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            except OSError as error:
                raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
            # exact names come last and win
            self._listings[folder] = {**{there.lower(): there for there in names}, **{there: there for there in names}}
        listing = self._listings[folder]
        return folder / listing.get(name, listing.get(name.lower(), name))


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such list; it comes with UCF101TrainTestSplits-RecognitionTask.zip") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text; fetch the official lists again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _read_classes(path: Path) -> list[str]:
    classes: list[str] = []
    for number, line in _lines(path):
        match = _CLASS_LINE.fullmatch(line)
        if not match or int(match[1]) != len(classes) + 1 or match[2] in classes:
            raise DataError(
                f"{path}: line {number}: {line[:80]!r} is not the number {len(classes) + 1} and a new class; "
                "fetch the official lists again"
            )
        classes.append(match[2])
    if len(classes) < 2:
        raise DataError(f"{path}: lists {len(classes)} classes; fetch the official lists again")
    return classes


def _read_list(path: Path, classes: list[str]) -> list[_Listed]:
    numbers = {name: number for number, name in enumerate(classes, 1)}
    listed: dict[str, tuple[int, _Listed]] = {}
    for number, line in _lines(path):
        match = _VIDEO_LINE.fullmatch(line)
        if not match:
            raise DataError(f"{path}: line {number}: {line[:80]!r} is not of the form class/video.avi [number]")
        one = _Listed(match[1], match[2])
        if one.label not in numbers:
            raise DataError(f"{path}: line {number}: {one.label!r} is not in classInd.txt; fetch the lists again")
        if match[3] and int(match[3]) != numbers[one.label]:
            raise DataError(
                f"{path}: line {number}: gives {one.name} the number {match[3]}, but classInd.txt says "
                f"{numbers[one.label]}; take both files from one archive"
            )
        if one.name in listed:
            raise DataError(f"{path}: line {number}: {one.name} is listed before, in line {listed[one.name][0]}")
        listed[one.name] = number, one
    return [one for _, one in listed.values()]
