"""Splits of many samples: opening and planning them takes no memory and no Python object per sample.

Files are sparse, so nothing is written; time is not asserted. `benchmarks/scale.py` measures 100 million samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oat_dist.data.index import open_split
from oat_dist.data.plan import ARGSORT_LIMIT
from oat_dist.data.windows import ShardWindows

SAMPLES = 12_000_000
SHARDS = 50
MIB = 2**20


@pytest.fixture(scope="module")
def scale() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        from benchmarks import scale

        yield scale


@pytest.fixture(scope="module")
def measured(scale: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("large") / "train"
    scale.write_split(folder, SAMPLES, SHARDS, sparse=True)
    size = (folder / "index.safetensors").stat().st_size
    assert size == 588_000_000 + size % 1000 and ARGSORT_LIMIT < SAMPLES  # 49 bytes a sample
    return scale.fresh(folder, 0)


def test_opening_takes_no_memory_and_no_objects(measured: dict[str, Any]) -> None:
    opened = measured["open"]
    assert measured["samples"] == SAMPLES
    assert opened["resident"] < 20 * MIB and opened["own"] < 20 * MIB  # one column alone has 48
    assert opened["objects"] < 2000 and opened["blocks"] < 20_000


def test_the_plan_of_any_step_is_computed_alone(measured: dict[str, Any]) -> None:
    """Steps all over the run for rank 517 of 1,024; the permutation would have 96 MB."""
    planned = measured["plan"]
    assert planned["resident"] < 8 * MIB and planned["own"] < 8 * MIB and planned["blocks"] < 20_000


def test_the_measure_sees_what_is_held(scale: Any) -> None:
    """The control: a permutation of this size, and an object a sample, would show."""
    taken, held = scale.grown(lambda: np.full(SAMPLES, 7))
    assert taken["own"] > 90 * MIB and len(held) == SAMPLES
    del held
    taken, held = scale.grown(lambda: [[i] for i in range(50_000)])
    assert taken["objects"] > 40_000 and taken["blocks"] > 40_000 and len(held) == 50_000


def test_the_synthetic_split_is_a_split(scale: Any, tmp_path: Path) -> None:
    scale.write_split(tmp_path / "train", 3000, 7)
    shards = open_split(tmp_path / "train")
    assert shards.index.name(2999) == "000002999.jpg" and shards.index.name(0) == "000000000.jpg"
    assert np.bincount(shards.index.shard).tolist() == [shard.samples for shard in shards.manifest.shards]
    order = ShardWindows(shards, 3).ids(0, 0, 0, 3000)
    assert sorted(order.tolist()) == list(range(3000))
