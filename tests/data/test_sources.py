"""Sources and the pack command: real folders in, splits out, every bad input one clear line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oat_dist.commands import pack
from oat_dist.data.index import open_split
from oat_dist.data.sources import parse_splits
from oat_dist.data.sources.digits import plan_digits
from oat_dist.data.sources.imagefolder import plan_imagefolder
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

ROOT = Path(__file__).parents[2]


def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def fill(root: Path, *names: str) -> Path:
    """Make files below `root`: real images, or text where the suffix says so."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if path.suffix == ".txt" else jpeg(seed))
    return root


def names_of(root: Path, **options: Fraction | None) -> dict[str, list[str]]:
    plan = plan_imagefolder(str(root), splits=options, seed=0)
    return {split: [sample.name for sample in samples] for split, samples in plan.splits.items()}


def test_splits_as_the_folders_say(tmp_path: Path) -> None:
    fill(tmp_path, "Train/b/1.jpg", "Train/a/deep/2.JPEG", "validation/a/3.png", "validation/b/4.bmp")
    plan = plan_imagefolder(str(tmp_path), splits={}, seed=0)
    assert plan.classes == ["a", "b"] and plan.notes == []
    assert names_of(tmp_path) == {
        "train": ["Train/a/deep/2.JPEG", "Train/b/1.jpg"],
        "val": ["validation/a/3.png", "validation/b/4.bmp"],
    }
    assert [sample.label for sample in plan.splits["train"]] == ["a", "b"]
    assert list(names_of(tmp_path, val=None)) == ["val"]


def test_class_folders_are_one_split(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    assert names_of(tmp_path) == {"train": ["a/1.jpg", "b/1.jpg", "b/2.jpg"]}
    assert list(names_of(tmp_path, test=None)) == ["test"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, "bus/1.jpg", "train/1.jpg")
    assert plan_imagefolder(str(tmp_path), splits={}, seed=0).classes == ["bus", "train"]


def test_dealing_is_an_exact_stratified_partition(tmp_path: Path) -> None:
    fill(tmp_path, *(f"a/{i:02d}.jpg" for i in range(17)), *(f"b/{i:02d}.jpg" for i in range(8)))
    shares = {"train": Fraction(7, 10), "val": Fraction(1, 5), "test": Fraction(1, 10)}
    dealt = names_of(tmp_path, **shares)
    assert sorted(name for names in dealt.values() for name in names) == sorted(names_of(tmp_path)["train"])
    counts = {split: Counter(name[0] for name in names) for split, names in dealt.items()}
    # 17 x (.7, .2, .1) = 11.9, 3.4, 1.7 and 8 x ... = 5.6, 1.6, 0.8: by largest remainder, train before val
    assert counts == {"train": Counter(a=12, b=6), "val": Counter(a=3, b=1), "test": Counter(a=2, b=1)}
    assert dealt == names_of(tmp_path, **shares)
    other = plan_imagefolder(str(tmp_path), splits=shares, seed=1).splits
    assert [s.name for s in other["test"]] != dealt["test"]


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/1.jpg", "b/notes.txt", "README.txt", ".DS_Store/x.txt", "a/.2.jpg", "__MACOSX/c/1.jpg")
    plan = plan_imagefolder(str(tmp_path), splits={}, seed=0)
    assert plan.notes == ["2 not an image and left out: README.txt, b/notes.txt"]
    assert names_of(tmp_path) == {"train": ["a/1.jpg", "b/1.jpg"]}
    fill(tmp_path / "2", "train/a/1.jpg", "train/b/1.jpg", "docs/1.jpg")
    assert plan_imagefolder(str(tmp_path / "2"), splits={}, seed=0).notes == ["1 not an image and left out: docs/"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    fill(tmp_path, "in/a/1.jpg", "in/b/1.jpg", "elsewhere/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "in/a/file.jpg").symlink_to(tmp_path / "elsewhere/2.jpg")
    (tmp_path / "in/b/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in/a")
    assert names_of(tmp_path / "in") == {
        "train": ["a/1.jpg", "a/file.jpg", "b/1.jpg", "b/folder/2.jpg", "b/folder/3.jpg"]
    }
    notes = plan_imagefolder(str(tmp_path / "in"), splits={}, seed=0).notes
    assert notes == ["1 met before through a link and left out: a/loop"]


def test_pipes_are_not_read(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    os.mkfifo(tmp_path / "a/2.jpg")
    assert names_of(tmp_path) == {"train": ["a/1.jpg", "b/1.jpg"]}


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a/1.jpg", "b/ünïcode.jpg")
    (tmp_path / "in" / os.fsdecode(b"a/\xff2.jpg")).write_bytes(jpeg(7))
    assert pack.main(["imagefolder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    shards = open_split(tmp_path / "out/train")
    assert [shards.index.name(i) for i in range(3)] == ["a/1.jpg", "a/\\xff2.jpg", "b/ünïcode.jpg"]


BAD_FOLDERS: list[tuple[list[str], list[str], str]] = [
    ([], [], "{root}: holds no class folder; put the images"),
    (["1.jpg"], [], "{root}: the image '1.jpg' lies in no class folder; put the images of each class"),
    (["a/1.jpg", "b/1.jpg", "stray.png"], [], "{root}: the image 'stray.png' lies in no class folder"),
    (["train/1.jpg", "val/1.jpg"], [], "{root}/train: the image '1.jpg' lies in no class folder"),
    (["a/1.jpg", "b/x.txt"], [], "{root}/b: empty class: no image in this folder; add images or remove"),
    (
        ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"],
        [],
        "{root}/val/b: empty class: split 'val' lacks a class that another split has; add images",
    ),
    (["data/a/1.jpg", "data/b/1.jpg"], [], "{root}: holds the single class 'data'; a classifier needs two"),
    (["val/a/1.jpg", "valid/a/1.jpg"], [], "{root}: 'val' and 'valid' both mean the split 'val'; remove one"),
    (["train/a/1.jpg", "train/b/1.jpg"], ["train=0.5,val=0.5"], "{root}: is split already (train); leave the shares"),
    (["train/a/1.jpg", "train/b/1.jpg"], ["test"], "{root}: has no split 'test'; it has train"),
    (
        [*(f"a/{i}.jpg" for i in range(20)), "b/1.jpg"],
        ["train=0.9", "val=0.1"],
        "class 'b' has only 1 images, none of them for split 'val' (0.1); add images or raise that share",
    ),
    (["a/1.jpg", "b/1.jpg"], ["train,val"], "--split: say how much each split gets, such as train=0.8"),
    (["a/1.jpg", "b/1.jpg"], ["train=0.8", "val=0.3"], "--split: shares must be above 0 and add up to 1, not 1.1"),
    (["a/1.jpg", "b/1.jpg"], ["train=1.5", "val=-0.5"], "--split: shares must be above 0 and add up to 1"),
    (["a/1.jpg", "b/1.jpg"], ["train=most"], "--split 'train=most': 'most' is not a number; write a share"),
    (["a/1.jpg", "b/1.jpg"], ["train=nan"], "--split 'train=nan': 'nan' is not a number"),
    (["a/1.jpg", "b/1.jpg"], ["train=0.5", "val"], "--split: give every split a share"),
    (["a/1.jpg", "b/1.jpg"], ["train", "train"], "--split train is given twice"),
    (["a/1.jpg", "b/1.jpg"], ["../x"], "--split '../x': write NAME or NAME=SHARE"),
]


@pytest.mark.parametrize(("files", "split", "message"), BAD_FOLDERS)
def test_bad_folders_give_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], split: list[str], message: str
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    fill(root, *files)
    options = [word for text in split for word in ("--split", text)]
    assert pack.main(["imagefolder", str(root), str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: " + message.format(root=root)) and captured.err.count("\n") == 1
    assert captured.out == "" and not out.exists()


def test_input_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for name, message in (
        ("missing", "missing: no such folder; check the path"),
        ("x.tar.gz", "x.tar.gz: a file, not a folder; unpack the archive first"),
    ):
        assert pack.main(["imagefolder", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert f"error: {tmp_path}/{message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_inside_the_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    for out in (tmp_path, tmp_path / "packed"):
        assert pack.main(["imagefolder", str(tmp_path), str(out)]) == 2
        assert "lies inside the input" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_unreadable_image_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = fill(tmp_path / "in", "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"), tmp_path / "out"
    (root / "val/b/bad.jpg").write_bytes(jpeg()[:-200])
    (root / "val/b/gone.jpg").symlink_to(tmp_path / "nowhere")
    assert pack.main(["imagefolder", str(root), str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {root}/val/b/") and "--on-bad skip" in captured.err
    assert all(path.name.startswith(".packing") for path in out.iterdir())  # no split, at most work to go on from
    assert pack.main(["imagefolder", str(root), str(out), "--on-bad", "skip"]) == 0
    captured = capsys.readouterr()
    assert "  skipped val/b/bad.jpg: " in captured.out
    assert "  skipped val/b/gone.jpg: No such file or directory" in captured.out
    assert len(open_split(out / "val")) == 2


def test_pack_command_from_any_folder(tmp_path: Path) -> None:
    fill(tmp_path, *(f"my photos/{name}/{i}.jpg" for name in "ab" for i in range(10)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "shards" / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    options = ("--split", "train=0.8", "--split", "val=0.2", "--shard-samples", "9", "--shard-bytes", "1M")
    done = script("pack.py", "imagefolder", "my photos", "my out", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 16 images of 2 classes (8 to 8 each)" in done.stdout and "in 2 shards, all 5x6" in done.stdout
    assert done.stdout.endswith("next: oat-dist verify 'my out'\n")
    checked = script("verify.py", "my out")
    assert (checked.returncode, checked.stderr) == (0, "") and "my out: all is well" in checked.stdout


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "in", "a/1.jpg", "b/1.jpg", "b/2.jpg", "b/x.txt")
    assert pack.main(["imagefolder", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 classes" and "note: 1 not an image and left out: b/x.txt" in lines
    assert [line.split() for line in lines[1:4]] == [["train"], ["a", "1"], ["b", "2"]]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", "x", "y"], "invalid choice: 'nosuch'"),
        (["digits", "-", "y", "--shard-bytes", "many"], "'many' is not a size; write one such as 256M"),
        (["digits", "-", "y", "--shard-samples", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        pack.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_parse_splits() -> None:
    assert parse_splits([]) == {}
    assert parse_splits(["train=0.8", "val=0.2"]) == parse_splits(["train=4/5,val=1/5"])
    assert parse_splits(["a=0.1,b=0.2,c=0.7"])["c"] == Fraction(7, 10)
    assert parse_splits(["test"]) == {"test": None}


def test_digits(tmp_path: Path) -> None:
    assert pack.main(["digits", "-", str(tmp_path)]) == 0
    train, test = open_split(tmp_path / "train"), open_split(tmp_path / "test")
    assert train.classes == test.classes == [str(k) for k in range(10)]
    assert len(train) + len(test) == 1797 and len(test) == 359
    assert train.manifest.image_sizes["min"] == train.manifest.image_sizes["max"] == [8, 8]
    names = [{shards.index.name(i) for i in range(len(shards))} for shards in (train, test)]
    assert not names[0] & names[1] and "0/0000.png" in names[0] | names[1]


def test_digit_images_are_the_scans() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    samples = {s.name: s for part in plan_digits("-", splits={}, seed=0).splits.values() for s in part}
    for number in range(0, 1797, 97):
        label = digits.target[number]
        sample = samples[f"{label}/{number:04d}.png"]
        assert sample.label == str(label) and isinstance(sample.data, bytes)
        pixels = np.asarray(Image.open(io.BytesIO(sample.data)))
        assert pixels.dtype == np.uint8 and pixels.shape == (8, 8)
        assert np.array_equal(pixels, np.floor(digits.images[number] * 255 / 16 + 0.5))
    data = b"".join(bytes(samples[name].data) for name in sorted(samples))  # the same on every machine
    assert sha256_bytes(data) == "81fbfecfa5e137c174bc2434852057fca008c3907c33cb6949920d2fd78544dd"


def test_digits_take_no_input() -> None:
    with pytest.raises(DataError, match="write - in place of 'folder'"):
        plan_digits("folder", splits={}, seed=0)


def test_digits_without_scikit_learn(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['sklearn.datasets'] = None; from oat_dist.commands.pack import main\n"
        f"sys.exit(main(['digits', '-', {str(tmp_path / 'out')!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'oat_dist[quickstart]'" in done.stderr and not (tmp_path / "out").exists()


def real_data(name: str) -> Path:
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip(f"needs {name} in the folder named by OAT_TEST_DATA")
    return Path(folder) / name


def test_real_photos(tmp_path: Path) -> None:
    with tarfile.open(real_data("hymenoptera.tar")) as archive:
        archive.extractall(tmp_path / "in", filter="data")
    assert pack.main(["imagefolder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    train, val = open_split(tmp_path / "out/train"), open_split(tmp_path / "out/val")
    assert train.classes == ["ants", "bees"] and (len(train), len(val)) == (245, 153)
    with tarfile.open(tmp_path / "out/train/train-000000.tar") as archive:
        kinds = Counter(name.partition(".")[2] for name in archive.getnames())
    assert kinds == Counter(cls=245, jpg=244, gif=1)


def test_real_cifar10_subset(tmp_path: Path) -> None:
    with tarfile.open(real_data("cifar10-jpg.tar.gz"), "r|gz") as archive:
        for taken, member in enumerate(m for m in archive if m.isreg()):
            if taken == 300:
                break
            # the first 300 are of one class: deal them to two
            file = archive.extractfile(member)
            assert file is not None
            path = tmp_path / "in" / "xy"[taken % 2] / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    out = tmp_path / "out"
    assert pack.main(["imagefolder", str(tmp_path / "in"), str(out), "--split", "train=0.8,val=0.2"]) == 0
    train = open_split(out / "train")
    assert len(train) == 240 and train.manifest.image_sizes["max"] == [32, 32]
    tar = (out / "train/train-000000.tar").read_bytes()
    for i in range(240):
        start = int(train.index.offset[i])
        source = tmp_path / "in" / train.index.name(i)
        assert tar[start : start + int(train.index.length[i])] == source.read_bytes()
        assert train.classes[train.index.label[i]] == source.parent.name
