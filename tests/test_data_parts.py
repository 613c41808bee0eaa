"""From configuration to data: what is refused, what is noted, and where data may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_server import ShardServer, write_split

from oat_dist.config import load_config
from oat_dist.data.index import ShardSet
from oat_dist.data.loader import TrainLoader
from oat_dist.data.stream import StreamSet
from oat_dist.data_parts import DataParts, build_data, open_location
from oat_dist.distributed import World
from oat_dist.errors import ConfigError, DataError


@pytest.fixture
def packed(digits: dict[str, ShardSet]) -> Path:
    return digits["train"].folder.parent


def data_of(tmp_path: Path, path: object, *overrides: str) -> DataParts:
    (tmp_path / "config.yaml").write_text("{}")
    given = [f"output_dir={tmp_path / 'run'}", f"data.path={path}", "data.image_size=8", *overrides]
    return build_data(load_config(tmp_path / "config.yaml", given), World())


def test_a_set_may_be_named_as_file_url(packed: Path) -> None:
    assert open_location(f"file://{packed}", "train").digest == open_location(str(packed), "train").digest


def test_a_remote_set_larger_than_the_cache_needs_windows(tmp_path: Path) -> None:
    write_split(tmp_path / "web" / "train", shards=4, samples=6, size=3000)
    cache = (f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gb=5e-5", "data.eval_split=null", "batch_size=8")
    with ShardServer(tmp_path / "web") as server:
        with pytest.raises(ConfigError) as caught:
            data_of(tmp_path, server.url, *cache)
        assert str(caught.value) == (
            f"{server.url}/train has 0.000123 GB, more than data.cache_gb=5e-05 holds: shards would be fetched again "
            "for every batch; use data.shuffle_shards=1, or a larger data.cache_gb"
        )
        data = data_of(tmp_path, server.url, *cache, "data.shuffle_shards=1")
        assert isinstance(data.loader, TrainLoader) and data.loader.shard_windows is not None
        assert data.loader.shard_windows.num_windows == 4
        data_of(tmp_path, server.url, *cache[:1], *cache[2:])  # without a limit it is all fetched
        # training and evaluation share the cache
        write_split(tmp_path / "web" / "test", shards=1, samples=6, size=3000)
        both = (*cache[:1], "data.cache_gb=13e-5", "batch_size=8")
        with pytest.raises(ConfigError, match=r"has 0.000123 GB, and train 3.07e-05 GB, more than"):
            data_of(tmp_path, server.url, *both)


@pytest.mark.parametrize(("group", "unit"), [(4, 4), (5, 10), (32, 32)])
def test_pairs_and_groups_stay_whole(tmp_path: Path, packed: Path, group: int, unit: int) -> None:
    mixed = ("data.mix=mixup", "anchor.scope=group", f"anchor.group_size={group}")
    data = data_of(tmp_path, packed, *mixed)
    assert data.loader.layout.unit == unit
    assert data.notes == ["note: data.mix=mixup in the 10 cross-entropy epochs only"]
    assert data_of(tmp_path, packed, *mixed[1:]).loader.layout.unit == group
    assert data_of(tmp_path, packed, *mixed, "epochs=10").notes == []


def test_only_the_cross_entropy_steps_are_mixed(tmp_path: Path, packed: Path) -> None:
    loader = data_of(tmp_path, packed, "data.mix=cutmix", "pretrain_epochs=1", "batch_size=700").loader
    mixed = [window.batches[0].mix is not None for window in loader.windows(1, 5)]
    assert loader.steps_per_epoch == 3 and mixed == [True, True, False, False]


STREAM = ("data.mode=stream", "data.stream.urls=a.tar", "data.stream.samples=99")


def test_a_stream_has_the_classes_of_the_evaluation_split(tmp_path: Path, packed: Path) -> None:
    data = data_of(tmp_path, packed, *STREAM)
    assert isinstance(data.train_set, StreamSet) and data.train_set.classes == [str(digit) for digit in range(10)]
    assert data.notes == ["note: data.mode=stream draws samples at random: no exact epochs, and no exact resume"]
    alone = data_of(tmp_path, "''", *STREAM, "data.eval_split=null", "data.stream.classes=3")
    assert len(alone.train_set.classes) == 3 and alone.eval_set is None
    with pytest.raises(DataError, match=r"data.stream.classes=3, but test of .* has 10 classes; leave data.stream.cl"):
        data_of(tmp_path, packed, *STREAM, "data.stream.classes=3")
