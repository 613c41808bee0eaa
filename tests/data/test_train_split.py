"""A part of the training split held out, and a long tail made of it: which images go, and what is refused."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from packing_checks import contents, image, visible

from oat_dist.commands import pack
from oat_dist.data.index import open_split
from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources import PackPlan
from oat_dist.data.sources.splits import deal_to_splits, parse_hold_out
from oat_dist.data.sources.train_split import hold_out, make_long_tailed
from oat_dist.errors import DataError

Capture = pytest.CaptureFixture[str]


def made(*counts: int, folder: str = "", classes: str = "abcdefghij", **others: int) -> PackPlan:
    """A split train with so many samples of each class; further splits with that many of each."""
    names = list(classes[: len(counts)])
    splits = {
        "train": [Sample(f"{folder}{k}/{i}.jpg", k, b"") for k, n in zip(names, counts, strict=True) for i in range(n)],
        **{split: [Sample(f"{k}/{i}", k, b"") for k in names for i in range(n)] for split, n in others.items()},
    }
    return PackPlan("made", names, splits)


def class_counts(plan: PackPlan, split: str = "train") -> list[int]:
    counts = Counter(sample.label for sample in plan.splits[split])
    return [counts[name] for name in plan.classes]


def names(plan: PackPlan, split: str = "train") -> set[str]:
    return {sample.name for sample in plan.splits[split]}


def test_the_profile_is_the_usual_one() -> None:
    """Cui et al. (2019) and Cao et al. (2019) on CIFAR-10: 12,406 images at imbalance 100, 20,431 at 10."""
    whole = made(*[5000] * 10, test=1000)
    hundred, ten = (make_long_tailed(whole, imbalance, seed=0) for imbalance in (100, 10))
    assert class_counts(hundred) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert (sum(class_counts(hundred)), sum(class_counts(ten))) == (12_406, 20_431)
    assert names(hundred) < names(ten) < names(whole)
    assert hundred.splits["test"] is whole.splits["test"]
    assert hundred.sources() == {"train": "made; long-tailed, imbalance 100", "test": "made"}
    assert hundred.notes == ["train is long-tailed, imbalance 100: 12,406 of 50,000 images, 5,000 of a to 50 of j"]
    assert names(hundred) == names(make_long_tailed(whole, 100, seed=0)) != names(make_long_tailed(whole, 100, seed=1))
    assert make_long_tailed(whole, None, seed=0) is whole
    # exact where the formula gives a whole number that comes out below it in floating point
    for imbalance in range(1, 60):
        assert class_counts(make_long_tailed(made(imbalance * 7, imbalance * 7), imbalance, seed=0))[1] == 7


def test_classes_that_are_too_small_keep_all() -> None:
    thinned = make_long_tailed(made(30, 100, 4, 100), 8, seed=0)
    assert class_counts(thinned) == [30, 50, 4, 12]
    assert thinned.notes[1:] == [
        "classes with fewer images than their place in the tail asks for keep all: a (30 of 100), c (4 of 25)"
    ]


def test_what_is_held_out_is_what_dealing_the_split_gives() -> None:
    """Also of the whole set, whose names begin with the split's folder."""
    for folder in ("", "data/train/"):
        plan = made(40, 25, folder=folder, test=3)
        held = hold_out(plan, {"val": Fraction(1, 10), "more": Fraction(1, 5)}, seed=3)
        shares = {"train": Fraction(7, 10), "val": Fraction(1, 10), "more": Fraction(1, 5)}
        alone = deal_to_splits(made(40, 25).splits["train"], shares, seed=3)
        assert list(held.splits) == ["train", "val", "more", "test"]
        for split, samples in alone.items():
            assert names(held, split) == {folder + sample.name for sample in samples}
        assert class_counts(held, "val") == [4, 2] and held.splits["test"] is plan.splits["test"]
        assert held.notes == ["held out of 65 images of train: 6 as val, 13 as more"]
    assert hold_out(plan, {}, seed=0) is plan


def test_held_out_first_then_thinned(tmp_path: Path, capsys: Capture) -> None:
    """The command, with a source that has no folders; the part held out is the same with and without a tail."""
    words = ["digits", "-", "--split", "train=0.5,test=0.5", "--hold-out", "val=0.2", "--workers", "1"]
    assert pack.main([*words[:2], str(tmp_path / "tail"), *words[2:], "--long-tail", "7.5", "--dry-run"]) == 0
    assert "note: train is long-tailed, imbalance 7.5: 323 of 722 images, " in capsys.readouterr().out
    assert visible(tmp_path / "tail") == []
    assert pack.main([*words[:2], str(tmp_path / "tail"), *words[2:], "--long-tail", "7.5"]) == 0
    assert "note: held out of 901 images of train: 179 as val\nnote: train is long-" in capsys.readouterr().out
    assert pack.main([*words[:2], str(tmp_path / "whole"), *words[2:]]) == 0
    for split in ("val", "test"):
        assert contents(tmp_path / "tail" / split) == contents(tmp_path / "whole" / split)
    tail, whole = (open_split(tmp_path / folder / "train") for folder in ("tail", "whole"))
    assert (tail.manifest.source, whole.manifest.source) == ("digits; long-tailed, imbalance 7.5", "digits")
    there = {whole.index.name(i) for i in range(len(whole))}
    assert {tail.index.name(i) for i in range(len(tail))} < there
    largest = max(whole.manifest.class_counts)
    assert tail.manifest.class_counts[0] == min(largest, whole.manifest.class_counts[0])
    assert tail.manifest.class_counts[-1] == int(largest / 7.5)

    again = [*words[:2], str(tmp_path / "tail"), *words[2:], "--long-tail", "3"]
    assert pack.main(again) == 2 and "tail/train: already exists; choose another" in capsys.readouterr().err
    assert pack.main([*again, "--overwrite"]) == 0
    assert open_split(tmp_path / "tail" / "train").manifest.source == "digits; long-tailed, imbalance 3"


def test_an_interrupted_pack_does_not_go_on_with_another_tail(tmp_path: Path, capsys: Capture) -> None:
    for k, label in enumerate("ab"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for i in range(40):
            (tmp_path / "in" / label / f"{i}.jpg").write_bytes(image(seed=40 * k + i))
    words = ["imagefolder", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-samples", "10", "--workers", "1"]
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(b"no image")  # it belongs into the last of six shards
    assert pack.main([*words, "--long-tail", "2"]) == 2
    assert "finished shards kept" in capsys.readouterr().err
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(image(seed=0))
    assert pack.main([*words, "--long-tail", "4"]) == 0
    assert "do not fit the present files and options: dropped, packed anew" in capsys.readouterr().err
    assert open_split(tmp_path / "out" / "train").manifest.class_counts == [40, 10]
    assert pack.main([words[0], words[1], str(tmp_path / "new"), *words[3:], "--long-tail", "4"]) == 0
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "new" / "train")


@pytest.mark.parametrize(
    ("plan", "imbalance", "message"),
    [
        (made(9, 9), 0.5, "--long-tail is 0.5; it must be at least 1"),
        (made(9, 9), float("nan"), "--long-tail is nan; it must be at least 1"),
        (made(9, 9), float("inf"), "--long-tail is inf; it must be at least 1"),
        (made(9), 2, "there is a single class; a long tail takes two or more"),
        (made(8, 9), 9.5, "the last class, 'b', would keep no image: the largest class of train has 9; .* at most 9"),
        (made(9, 0), 2, "split 'train': empty class: 'b' has no sample"),
        (PackPlan("made", ["a", "b"], {"test": []}), 2, "--long-tail: there is no split 'train' .* only test"),
    ],
)
def test_tails_that_cannot_be(plan: PackPlan, imbalance: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_long_tailed(plan, imbalance, seed=0)


def test_what_cannot_be_held_out(tmp_path: Path, capsys: Capture) -> None:
    val = {"val": Fraction(1, 10)}
    for plan, message in (
        (made(20, 20, val=3), "--hold-out val: the input has a split 'val' already; choose another name"),
        (made(20, 2), "class 'b' has only 2 images, none of them for split 'val'"),
        (PackPlan("made", ["a", "b"], {"test": []}), "--hold-out: there is no split 'train' to take from, only test"),
    ):
        with pytest.raises(DataError, match=message):
            hold_out(plan, val, seed=0)
    assert parse_hold_out(["val=0.1,more=1/5"]) == {"val": Fraction(1, 10), "more": Fraction(1, 5)}
    for text, message in (
        ("val", "--hold-out: say how much, NAME=SHARE, such as val=0.1"),
        ("val=1", "--hold-out: shares must be above 0 and add up to less than 1"),
        ("val=0", "--hold-out: shares must be above 0"),
        ("val=x", "--hold-out 'val=x': 'x' is not a number"),
        ("../val=0.1", "--hold-out '../val=0.1': write NAME=SHARE"),
        ("val=0.1,val=0.1", "--hold-out val is given twice"),
        ("train=0.1", "--hold-out train: the input has a split 'train' already"),
    ):
        assert pack.main(["digits", "-", str(tmp_path / "out"), "--hold-out", text]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert visible(tmp_path / "out") == []
