"""The image sets that `data.py` measures on: files in class folders, and the same files packed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from oat_dist import write_shards
from oat_dist.data.index import ShardSet
from oat_dist.errors import DataError

__all__ = ["CIFAR_ARCHIVE", "PHOTO_ARCHIVE", "SHORT_SIDE", "ImageSet", "cifar10", "photos", "synthetic"]

CIFAR_ARCHIVE = "cifar10-jpg.tar.gz"
PHOTO_ARCHIVE = "hymenoptera.tar"
SMALL, LARGE = 85_000, (1280, 960)  # pixels
SHORT_SIDE = 256  # of the shards with shrunk photos
QUALITY = 90  # of JPEGs that are made here, with Pillow's default of 4:2:0
BATCH = 32  # of photos
TILES = 6  # photos in a large one

Named = tuple[str, str, bytes]  # name, class, JPEG


@dataclass(frozen=True)
class ImageSet:
    """One set of JPEGs and how it is trained on.

    Attributes:
        files: folder of class folders.
        shards: the same files packed, in one tar.
        shrunk: the same, packed with `SHORT_SIDE`; None: they are as small already.
        size, batch, crop, augment: as `ImagePipeline` and `Layout` take them.
    """

    name: str
    files: Path
    shards: ShardSet
    shrunk: ShardSet | None
    size: int
    batch: int
    crop: str
    augment: tuple[str, ...]

    @property
    def tars(self) -> list[str]:
        return [str(self.shards.folder / shard.name) for shard in self.shards.manifest.shards]

    @property
    def images(self) -> int:
        """How many a pass gives: whole batches."""
        return len(self.shards) // self.batch * self.batch

    def describe(self) -> str:
        index = self.shards.index
        pixels = index.width.astype(np.int64) * index.height
        bits = 8 * int(index.length.sum()) / int(pixels.sum())
        return (
            f"{self.name}: {len(self.shards):,} JPEGs of {pixels.mean() / 1e6:.3g} megapixels, {bits:.1f} bits a "
            f"pixel, to {self.size}x{self.size}, {' + '.join((self.crop, *self.augment))}, batches of {self.batch}"
        )


def cifar10(data: Path, folder: Path, count: int) -> ImageSet:
    """A seeded choice of CIFAR-10's training images."""
    found = [(name.replace("/", "-"), label, jpeg) for name, label, jpeg in _members(data / CIFAR_ARCHIVE, "train")]
    return _small("CIFAR-10", _choice(found, count), folder)


def photos(data: Path, folder: Path, count: int) -> list[ImageSet]:
    """Three sets of at most `count` photos.

    M: as they are, but for those that libjpeg-turbo alone cannot read (a GIF, odd colours), which no ceiling has.
    S: those shrunk to 0.085 megapixels each.
    L: mosaics of 1.23 megapixels, each of six photos at about their own scale: one of them enlarged would have less
       detail a pixel than a photo of that size, and so be cheap to decode.
    """
    found = [
        (f"{split}-{Path(name).name}", label, jpeg)
        for split in ("train", "val")
        for name, label, jpeg in _members(data / PHOTO_ARCHIVE, split)
        if _plain(jpeg)
    ]
    middle = _choice(found, count)
    opened = [Image.open(io.BytesIO(jpeg)).convert("RGB") for _, _, jpeg in middle]
    small = [(name, label, _shrunk(image)) for (name, label, _), image in zip(middle, opened, strict=True)]
    large = [(f"{i:04d}.jpg", middle[i][1], _mosaic(opened, i)) for i in range(max(BATCH, len(middle) // 3))]
    return [
        _photos("photos S", small, folder / "S", shrink=False),
        _photos("photos M", middle, folder / "M", shrink=True),
        _photos("photos L", large, folder / "L", shrink=True),
    ]


def synthetic(folder: Path, count: int = 64) -> list[ImageSet]:
    """A set like CIFAR-10 and one like photos, seeded, for tests: noise."""
    random = np.random.default_rng(0)
    sets = []
    for width, height in ((32, 32), (80, 60)):
        pixels_NHWC = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        sets.append([(f"{i:03d}.jpg", f"class {i % 3}", _jpeg(Image.fromarray(pixels_NHWC[i]))) for i in range(count)])
    return [
        _small("small", sets[0], folder / "small", batch=BATCH),
        _photos("photos", sets[1], folder / "photos", shrink=False, size=48),
    ]


def _small(name: str, images: Sequence[Named], folder: Path, batch: int = 256) -> ImageSet:
    files, shards = _written(images, folder)
    batch = min(batch, len(images))
    return ImageSet(name, files, shards, None, 32, batch, "squash", ("flip", "pad_crop"))


def _photos(name: str, images: Sequence[Named], folder: Path, *, shrink: bool, size: int = 224) -> ImageSet:
    files, shards = _written(images, folder)
    shrunk = write_shards(_samples(files), folder / "shrunk" / "train", short_side=SHORT_SIDE) if shrink else None
    return ImageSet(name, files, shards, shrunk, size, BATCH, "random_resized_crop", ("flip",))


def _written(images: Iterable[Named], folder: Path) -> tuple[Path, ShardSet]:
    """The files in class folders, and packed."""
    files = folder / "files"
    for name, label, data in images:
        (files / label).mkdir(parents=True, exist_ok=True)
        (files / label / name).write_bytes(data)
    return files, write_shards(_samples(files), folder / "packed" / "train")


def _samples(files: Path) -> list[tuple[str, str, Path]]:
    return [(f"{path.parent.name}/{path.name}", path.parent.name, path) for path in sorted(files.glob("*/*"))]


def _choice(found: Sequence[Named], count: int) -> list[Named]:
    return [found[i] for i in np.sort(np.random.default_rng(0).permutation(len(found))[:count])]


def _members(archive: Path, split: str) -> list[Named]:
    """The files of `split/<class>/` in a tar: (path within it, class, content)."""
    found = []
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                parts = Path(member.name).parts
                if member.isfile() and split in parts[:-2]:
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(("/".join(parts[-2:]), parts[-2], file.read()))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{archive}: cannot be read ({error}); use --data FOLDER, the folder that holds it") from error
    return sorted(found)


def _plain(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return False
    return True


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _shrunk(image: Image.Image) -> bytes:
    scale = min((SMALL / (image.width * image.height)) ** 0.5, 1.0)
    size = (round(image.width * scale), round(image.height * scale))
    return _jpeg(image.resize(size, Image.Resampling.LANCZOS))


def _mosaic(images: Sequence[Image.Image], seed: int) -> bytes:
    """Three by two photos, each resized to cover its tile and cut to it."""
    tile = -(-LARGE[0] // 3), LARGE[1] // 2
    whole = Image.new("RGB", LARGE)
    for place, i in enumerate(np.random.default_rng(seed).permutation(len(images))[:TILES]):
        image = images[i]
        scale = max(tile[0] / image.width, tile[1] / image.height)
        size = max(round(image.width * scale), tile[0]), max(round(image.height * scale), tile[1])
        part = image.resize(size, Image.Resampling.LANCZOS).crop((0, 0, *tile))
        whole.paste(part, (place % 3 * tile[0], place // 3 * tile[1]))
    return _jpeg(whole)
