"""Real packed sets, shared by all tests. Nothing here is a stand-in: tars on disk, written by our own packer."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_shards, write_splits
from oat_dist.data.packing.samples import Sample
from oat_dist.data.sources import SOURCES

CIFAR_CLASSES = ("airplane", "automobile", "bird")
CIFAR_IMAGES = 40  # of each class

PhotoMaker = Callable[..., ShardSet]

# They take the longest, so that they begin first: two workers then end at about the same time.
SLOWEST = (
    *("slurm/test_jobs", "test_training", "test_launch", "test_portable", "test_campaign", "test_engines"),
    *("test_verify_parallel", "test_model_options", "test_exactness", "test_live", "test_export", "test_kill"),
    *("test_doctor", "test_photos", "test_benchmarks", "test_stopping", "test_evaluate_command"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(SLOWEST)}
    top = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        return places.get(item.path.relative_to(top).with_suffix("").as_posix(), len(places))

    items.sort(key=place)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """scikit-learn's 1,797 digits (8x8 PNG), packed as train (in three shards) and test. Read only."""
    plan = SOURCES["digits"]("-", splits={}, seed=0)
    folder = tmp_path_factory.mktemp("digits")
    return write_splits(plan.splits, folder, classes=plan.classes, source=plan.source, shard_samples=600)


@pytest.fixture(scope="session")
def noisy_digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """The digits at 32x32 with a little noise in every pixel. Read only.

    On the plain ones' even ground several outputs of a convolution are equal but for rounding, so that a max-pooling
    or ReLU decides by it, and two exact ways to train are suddenly 1e-4 apart.
    """
    plan = SOURCES["digits"]("-", splits={}, seed=0)
    splits = {
        split: [_noisy(sample, number) for number, sample in enumerate(plan.splits[split])] for split in plan.splits
    }
    folder = tmp_path_factory.mktemp("noisy-digits")
    return write_splits(splits, folder, classes=plan.classes, source=plan.source, shard_samples=600)


def _noisy(sample: Sample, seed: int) -> Sample:
    assert isinstance(sample.data, bytes)
    image = Image.open(io.BytesIO(sample.data)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    noise = np.random.default_rng(seed).integers(0, 16, (32, 32, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(image) // 17 * 16 + noise).astype(np.uint8)).save(file, "PNG", compress_level=0)
    return sample._replace(data=file.getvalue())


@pytest.fixture(scope="session")
def cifar_samples() -> list[Sample]:
    """The first 40 training images of three classes of CIFAR-10 (32x32 JPEG), streamed out of the archive."""
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip("set OAT_TEST_DATA to the folder that holds cifar10-jpg.tar.gz")
    left = dict.fromkeys(CIFAR_CLASSES, CIFAR_IMAGES)
    samples = []
    with tarfile.open(Path(folder) / "cifar10-jpg.tar.gz", "r|gz") as archive:
        for member in archive:
            split, _, rest = member.name.partition("/")
            label = rest.partition("/")[0]
            if member.isfile() and split == "train" and left.get(label):
                file = archive.extractfile(member)
                assert file is not None
                samples.append(Sample(rest, label, file.read()))
                left[label] -= 1
                if not any(left.values()):
                    return samples
    pytest.fail(f"the archive lacks images: {left}")


@pytest.fixture(scope="session")
def cifar(cifar_samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """`cifar_samples`, packed in three shards. Read only."""
    return write_shards(cifar_samples, tmp_path_factory.mktemp("cifar") / "train", shard_samples=50)


@pytest.fixture
def make_photos(tmp_path: Path) -> PhotoMaker:
    """A function that packs synthetic photos, JPEG and PNG by turns, of mixed sizes, for tests that damage them."""

    def make(count: int = 40, *, classes: int = 3, shard_samples: int = 12, split: str = "photos") -> ShardSet:
        samples = [
            Sample(f"{i:04d}.{'png' if i % 2 else 'jpg'}", f"class {i % classes}", synthetic_photo(i))
            for i in range(count)
        ]
        return write_shards(samples, tmp_path / split, shard_samples=shard_samples)

    return make


def synthetic_photo(number: int) -> bytes:
    """A smooth field of colour with some noise, 12 to 60 pixels a side: PNG if `number` is odd, else JPEG."""
    random = np.random.default_rng(number)
    width, height = random.integers(12, 61, 2).tolist()
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    pixels = np.clip(smooth + random.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if number % 2 else "JPEG", **({} if number % 2 else {"quality": 90}))
    return file.getvalue()
