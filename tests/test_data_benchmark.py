"""`benchmarks/data.py` compares like with like: all sides give equally many images, steps are fed the same batches."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import data_measure
from benchmarks.data_goals import goals
from benchmarks.data_measure import Side, Timing, measure
from benchmarks.data_ours import CACHED, CEILING, OURS
from benchmarks.data_peers import RECIPE
from benchmarks.data_sets import ImageSet, synthetic
from benchmarks.data_shares import shares
from benchmarks.data_sides import count_images
from benchmarks.data_steps import IN_MEMORY, LOADED, feeds, step_sides

IMAGES = 64


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ImageSet]:
    return synthetic(tmp_path_factory.mktemp("images"), IMAGES)


@pytest.mark.parametrize("number", [0, 1])
def test_every_side_gives_all_images(sets: list[ImageSet], number: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        found = count_images(sets[number], tmp_path)
        gc.collect()
    assert {RECIPE, "ImageFolder + DataLoader, float", OURS, CACHED, CEILING} <= found.keys()
    assert set(found.values()) == {IMAGES}


def test_steps_are_fed_the_same_batches(sets: list[ImageSet]) -> None:
    both, close = feeds(sets[0], batch=24)
    for epoch in range(2):
        pairs = list(zip(both[LOADED](epoch), both[IN_MEMORY](epoch), strict=True))
        assert len(pairs) == IMAGES // 24
        for ours, memory in pairs:
            assert torch.equal(ours[0], memory[0]) and torch.equal(ours[1], memory[1])
    first, second = (next(iter(both[IN_MEMORY](epoch)))[0] for epoch in range(2))
    assert not torch.equal(first, second)  # another order, augmented anew
    close()
    assert [side.run() for side in step_sides(sets[0])] == [IMAGES, IMAGES]


def test_sides_are_timed_in_turn_after_they_have_warmed_up() -> None:
    order: list[str] = []

    def side(name: str) -> Side:
        def run() -> int:
            order.append(name)
            return 5

        return Side(name, run, calls=1)

    found = measure([side("a"), side("b")], repeats=2)
    assert "".join(order) == "aabb" + "abab"
    assert {(timing.samples, len(timing.cpu), len(timing.wall)) for timing in found.values()} == {(5, 2, 2)}


def test_a_goal_is_judged_by_the_median_of_ratios() -> None:
    timings = {RECIPE: Timing(1, [500.0, 600.0, 100.0]), OURS: Timing(1, [10.0, 10.0, 10.0])}
    [jpeg] = [goal for goal in goals({"CIFAR-10": {**timings, CACHED: timings[OURS]}}) if goal.wanted == 38]
    assert jpeg.found == [50.0, 60.0, 10.0] and jpeg.reached
    timings[OURS] = Timing(1, [15.0, 20.0, 1.0])
    [jpeg, cached] = goals({"CIFAR-10": {**timings, CACHED: timings[OURS]}})
    assert (jpeg.wanted, jpeg.reached, cached.wanted, cached.reached) == (38, False, 126, False)


def test_the_parts_are_timed_beside_the_loader(sets: list[ImageSet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_measure, "SECONDS", 0.0)
    found = shares(sets[1], repeats=1)
    assert list(found) == ["read", "boxes", "decode and crop", "augment", "batches, threads"]
    assert all(found[part] > 0 for part in list(found)[:-1])
