"""The cache of decoded images: the same batches as without, shared on disk, never wrong after a crash."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from oat_dist.data.builder import BatchBuilder
from oat_dist.data.decoded_cache import DecodedCache, open_decoded_cache
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError

SIZE = 16
SQUASH = ImagePipeline(SIZE, "squash", ("flip",), seed=3)
CROPS = ImagePipeline(SIZE, "random_resized_crop", ("flip",), seed=3)
_HEADER = 4096


def cache_of(kind: str, shards: ShardSet, pipeline: ImagePipeline, folder: Path) -> DecodedCache:
    cache = open_decoded_cache(kind, shards, pipeline, folder)
    assert cache is not None
    return cache


def batches(builder: BatchBuilder, epochs: range = range(3)) -> list[torch.Tensor]:
    ids = np.random.default_rng(0).permutation(builder.shards.num_samples)
    return [builder.build(part, epoch).images_BHWC for epoch in epochs for part in np.array_split(ids, 5)]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_batches_are_those_of_no_cache(cifar: ShardSet, kind: str, tmp_path: Path) -> None:
    plain = BatchBuilder(cifar, SQUASH)
    cache = cache_of(kind, cifar, SQUASH, tmp_path)
    cached = BatchBuilder(cifar, SQUASH, decoded=cache)
    assert not cache.complete
    first = batches(cached, range(1))
    assert cache.complete
    cached.reader.read = None  # from here on nothing is read again
    found = first + batches(cached, range(1, 3))
    assert all(map(torch.equal, found, batches(plain)))
    assert not torch.equal(found[0], found[5])  # flips are drawn anew in every epoch all the same


def test_whole_images_are_kept_where_the_crop_is_drawn_anew(make_photos: object, tmp_path: Path) -> None:
    shards = make_photos(20)
    cache = cache_of("ram", shards, CROPS, tmp_path)
    builder = BatchBuilder(shards, CROPS, decoded=cache)
    first = batches(builder, range(2))
    builder.reader.read = None
    assert all(map(torch.equal, first, batches(builder, range(2))))
    assert not torch.equal(first[0], first[5])  # another crop in the next epoch
    uncached = batches(BatchBuilder(shards, CROPS), range(2))
    # the same boxes; the pixels differ by what scaled decoding leaves out
    distance = torch.stack([(a.float() - b.float()).abs().mean() for a, b in zip(first, uncached, strict=True)])
    assert distance.max() < 4.0


def test_a_partly_filled_batch(cifar: ShardSet, tmp_path: Path) -> None:
    builder = BatchBuilder(cifar, SQUASH, decoded=cache_of("ram", cifar, SQUASH, tmp_path))
    builder.build(np.array([5, 1]))
    ids = np.array([0, 5, 9, 1])
    assert torch.equal(builder.build(ids).images_BHWC, BatchBuilder(cifar, SQUASH).build(ids).images_BHWC)


def test_what_is_kept_is_of_one_recipe(make_photos: object, tmp_path: Path) -> None:
    """Squashed images are no centers, and centers of one fraction none of another."""
    shards = make_photos(20)
    recipes = [SQUASH, *(ImagePipeline(SIZE, "center_crop", crop_fraction=part) for part in (0.875, 0.5))]
    for pipeline in (*recipes, *recipes):
        cache = cache_of("disk", shards, pipeline, tmp_path)
        found = BatchBuilder(shards, pipeline, decoded=cache).build(np.arange(20)).images_BHWC
        assert torch.equal(found, BatchBuilder(shards, pipeline).build(np.arange(20)).images_BHWC)
    assert len(list(tmp_path.glob("*.decoded"))) == 3


def test_memory_promised_to_one_cache_is_not_there_for_another(cifar: ShardSet) -> None:
    free = psutil.virtual_memory().available
    assert open_decoded_cache("ram", cifar, SQUASH) is not None
    with pytest.raises(ConfigError, match=r"data.decoded_cache=ram needs .* GiB are free here"):
        open_decoded_cache("ram", cifar, SQUASH, reserved=free)


def fill(cifar: ShardSet, folder: Path) -> Path:
    cache = cache_of("disk", cifar, SQUASH, folder)
    BatchBuilder(cifar, SQUASH, decoded=cache).build(np.arange(cifar.num_samples))
    cache.keep()
    [path] = folder.glob("*.decoded")
    return path


def filled(cifar: ShardSet, folder: Path) -> int:
    return int(cache_of("disk", cifar, SQUASH, folder).filled_N.sum())


def rewrite_header(path: Path, **changes: object) -> None:
    with path.open("r+b") as file:
        header = json.loads(file.read(_HEADER)) | changes
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(_HEADER))


def test_a_later_process_finds_what_is_there(cifar: ShardSet, tmp_path: Path) -> None:
    path = fill(cifar, tmp_path)
    assert filled(cifar, tmp_path) == cifar.num_samples
    rewrite_header(path, boot="another start of the machine")
    assert filled(cifar, tmp_path) == cifar.num_samples  # it was complete, and synced


def test_a_partial_file_of_another_boot_is_begun_anew(cifar: ShardSet, tmp_path: Path) -> None:
    """A byte may have reached the disk without its pixels."""
    path = fill(cifar, tmp_path)
    rewrite_header(path, complete=False)
    assert filled(cifar, tmp_path) == cifar.num_samples
    rewrite_header(path, complete=False, boot="another start of the machine")
    assert filled(cifar, tmp_path) == 0


@pytest.mark.parametrize("harm", ["cut", "header", "other data"])
def test_a_file_that_is_not_ours_is_replaced(cifar: ShardSet, tmp_path: Path, harm: str) -> None:
    path = fill(cifar, tmp_path)
    if harm == "cut":
        with path.open("r+b") as file:
            file.truncate(_HEADER + 7)
    elif harm == "header":
        with path.open("r+b") as file:
            file.write(b"\x00" * 64)
    else:
        rewrite_header(path, digest="0" * 64)
    assert filled(cifar, tmp_path) == 0
    assert filled(cifar, tmp_path) == 0  # and the new one is in order


def test_two_processes_share_a_file_and_a_killed_one_leaves_it_right(cifar: ShardSet, tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from oat_dist.data.index import open_split\n"
        "from test_decoded_cache import *\n"
        "shards = open_split(sys.argv[1])\n"
        "builder = BatchBuilder(shards, SQUASH, decoded=cache_of('disk', shards, SQUASH, Path(sys.argv[2])))\n"
        "builder.build(np.arange(40)); print('half', flush=True)\n"
        "while True: builder.build(np.random.default_rng().integers(0, 100, 8))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", program, str(cifar.folder), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout is not None and child.stdout.readline() == "half\n"
        cache = cache_of("disk", cifar, SQUASH, tmp_path)
        assert cache.filled_N[:40].all()
        os.kill(child.pid, signal.SIGKILL)
    found = BatchBuilder(cifar, SQUASH, decoded=cache).build(np.arange(120)).images_BHWC
    assert torch.equal(found, BatchBuilder(cifar, SQUASH).build(np.arange(120)).images_BHWC)


def test_a_disk_too_small_is_said_at_the_start(cifar: ShardSet, tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\n"
        "from oat_dist.data.index import open_split\n"
        "from test_decoded_cache import *\n"
        "shards = open_split(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try: cache_of('disk', shards, SQUASH, Path(sys.argv[2]))\n"
        "except ConfigError as error: print(error)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", program, str(cifar.folder), str(tmp_path)]
    text = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}).stdout
    assert text.startswith("data.decoded_cache=disk needs 0.0 GiB in ")
    assert "the disk has not that much; use another data.cache_dir, pack with --short-side, or" in text
    assert not list(tmp_path.glob("*.new")) and not list(tmp_path.glob("*.decoded"))


def test_more_than_the_memory_is_refused(cifar: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"data.decoded_cache=ram needs .* GiB for each of 999999999 processes to"):
        open_decoded_cache("ram", cifar, SQUASH, processes=999_999_999)


def test_no_cache_and_a_folder_that_cannot_be_made(cifar: ShardSet, tmp_path: Path) -> None:
    assert open_decoded_cache("none", cifar, SQUASH, tmp_path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"cannot be written .*use another data.cache_dir") as caught:
        open_decoded_cache("disk", cifar, SQUASH, tmp_path / "file" / "deeper")
    assert caught.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
