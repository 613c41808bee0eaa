"""ShardReader: the bytes of a sample, from many threads, and every way in which a shard can fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from oat_dist.data import storage
from oat_dist.data.index import ShardSet
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")


def slices(shards: ShardSet) -> list[bytes]:
    """Every sample cut out of its shard by hand."""
    files = [(shards.folder / shard.name).read_bytes() for shard in shards.manifest.shards]
    index = shards.index
    rows = zip(index.shard.tolist(), index.offset.tolist(), index.length.tolist(), strict=True)
    return [files[shard][offset : offset + length] for shard, offset, length in rows]


def open_shards(shards: ShardSet) -> int:
    """How many descriptors of this process lie in the folder of the set."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return sum(target.startswith(str(shards.folder)) for target in targets)


def test_bytes_come_back_as_packed(digits: dict[str, ShardSet]) -> None:
    train = digits["train"]
    assert len(train.manifest.shards) == 3
    reader = ShardReader(train)
    assert [reader.read(i) for i in range(len(train))] == slices(train)
    assert open_shards(train) == 3
    reader.close()
    assert open_shards(train) == 0


@pytest.mark.parametrize("max_open", [1, 2, 256])
def test_many_threads_read_right_also_with_few_files_open(
    digits: dict[str, ShardSet], max_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN", max_open)
    train = digits["train"]
    expected = slices(train)
    reader = ShardReader(train)
    ids = np.random.default_rng(0).integers(0, len(train), 6000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(reader.read, ids, chunksize=50))
    assert read == [expected[i] for i in ids]
    assert open_shards(train) == min(max_open, 3)
    reader.close()
    assert open_shards(train) == 0


def test_a_closed_reader_opens_its_shards_again(digits: dict[str, ShardSet]) -> None:
    reader = ShardReader(digits["test"])
    first = reader.read(0)
    reader.close()
    reader.close()
    assert reader.read(0) == first
    reader.close()


def test_a_missing_shard_is_named(make_photos: Callable[..., ShardSet]) -> None:
    shards = make_photos(20, shard_samples=10)
    gone = shards.folder / shards.manifest.shards[1].name
    gone.rename(gone.with_suffix(".elsewhere"))
    reader = ShardReader(shards)
    for sample_id, shard in enumerate(shards.index.shard.tolist()):
        if shard == 0:
            assert len(reader.read(sample_id)) == shards.index.length[sample_id]
        else:
            with pytest.raises(DataError, match=f"{gone}: cannot be read.*restore the shard"):
                reader.read(sample_id)
    reader.close()


def test_a_shard_cut_short_while_open_is_named(make_photos: Callable[..., ShardSet]) -> None:
    shards = make_photos(20, shard_samples=10)
    reader = ShardReader(shards)
    expected = [reader.read(i) for i in range(20)]
    ends = (shards.index.offset + shards.index.length).tolist()
    victim = int(np.flatnonzero(shards.index.shard == 1)[5])
    path = shards.folder / shards.manifest.shards[1].name
    os.truncate(path, ends[victim] - 1)
    for sample_id in range(20):
        if shards.index.shard[sample_id] == 0 or ends[sample_id] < ends[victim]:
            assert reader.read(sample_id) == expected[sample_id]
        else:
            with pytest.raises(DataError, match=rf"{path}: the shard ends before sample {sample_id} does.*restore it"):
                reader.read(sample_id)
    reader.close()


def test_a_shard_that_is_a_folder_is_an_error_not_a_traceback(make_photos: Callable[..., ShardSet]) -> None:
    shards = make_photos(6)
    path = shards.folder / shards.manifest.shards[0].name
    path.unlink()
    path.mkdir()
    reader = ShardReader(shards)
    with pytest.raises(DataError, match="cannot be read"):
        reader.read(0)
    reader.close()


def test_a_read_that_fails_for_a_moment_is_tried_again(
    make_photos: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives a real EIO (of unmapped memory, behind the name of the shard) until the shard is back."""
    monkeypatch.setattr(storage, "_RETRY_DELAYS_S", (0.02, 0.3, 0.3))
    shards = make_photos(20, shard_samples=10)
    path = shards.folder / shards.manifest.shards[0].name
    sample = int(np.flatnonzero(shards.index.shard == 0)[3])
    reader = ShardReader(shards)
    expected = reader.read(sample)
    reader.close()
    away = path.rename(path.with_suffix(".away"))
    path.symlink_to("/proc/self/mem")
    back = threading.Timer(0.1, lambda: away.replace(path))
    back.start()
    assert reader.read(sample) == expected
    back.join()
    assert not path.is_symlink() and open_shards(shards) == 1
    reader.close()


def test_a_read_that_keeps_failing_stops(make_photos: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    shards = make_photos(6)
    path = shards.folder / shards.manifest.shards[0].name
    path.unlink()
    path.symlink_to("/proc/self/mem")
    reader = ShardReader(shards)
    with pytest.raises(
        DataError, match=f"{path}: cannot be read in 4 tries .Input/output error.; mend that or restore"
    ):
        reader.read(0)
    reader.close()
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read .No such file or directory.; mend"):  # once
        reader.read(0)
