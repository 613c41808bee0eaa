"""What others would use: the usual webdataset recipe, ImageFolder + DataLoader, mosaicml-streaming, DALI on the CPU.

Each does what our loader does (crop, flip, batches) in its own usual way, in this process, without workers. The last
two are measured where they can be imported; they are no dependency of ours.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.data_measure import Side
from benchmarks.data_sets import ImageSet

__all__ = ["AT_RANDOM", "IN_ORDER", "RECIPE", "peer_sides", "reading_sides"]

RECIPE = "webdataset recipe, float"
IN_ORDER = "webdataset, the next in order"
AT_RANDOM = "webdataset, one at random"
_SHUFFLED = 1000


def peer_sides(images: ImageSet, folder: Path) -> tuple[list[Side], dict[str, str]]:
    """The sides that can be had here, and why the others cannot."""
    sides, missing = [_recipe(images), _image_folder(images)], {}
    makers: dict[str, Callable[[ImageSet, Path], Side]] = {"mosaicml-streaming": _streaming, "DALI on the CPU": _dali}
    for name, make in makers.items():
        try:
            sides.append(make(images, folder))
        except ImportError as error:
            missing[name] = f"not installed ({error})"
        except (RuntimeError, OSError) as error:
            missing[name] = " ".join(str(error).split())[:200]
    return sides, missing


def reading_sides(images: ImageSet) -> list[Side]:
    """Bytes of samples, not decoded: in order, and one somewhere in the tar, for which all before it are read."""
    places = np.random.default_rng(2).integers(len(images.shards), size=5)

    def in_order() -> int:
        return sum(1 for _ in webdataset.WebDataset(images.tars, shardshuffle=False))

    def at_random() -> int:
        for place in places.tolist():
            next(itertools.islice(webdataset.WebDataset(images.tars, shardshuffle=False), place, None))
        return len(places)

    return [Side(IN_ORDER, in_order), Side(AT_RANDOM, at_random, calls=1)]


def _transform(images: ImageSet) -> Callable[[Image.Image], Any]:
    """The augmentation of `images` as torchvision has it, to a float tensor (3, S, S)."""
    if images.crop == "random_resized_crop":
        crop = transforms.RandomResizedCrop(images.size)
    else:
        crop = transforms.RandomCrop(images.size, padding=images.size // 8)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def _counted(batches: Callable[[], Iterable[Any]]) -> Callable[[], int]:
    return lambda: sum(len(labels) for _, labels in batches())


def _recipe(images: ImageSet) -> Side:
    dataset = (
        webdataset.WebDataset(images.tars, shardshuffle=False)
        .shuffle(_SHUFFLED)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_transform(images), int)
        .batched(images.batch, partial=False)
    )
    return Side(RECIPE, _counted(lambda: webdataset.WebLoader(dataset, batch_size=None, num_workers=0)))


def _image_folder(images: ImageSet) -> Side:
    dataset = torchvision.datasets.ImageFolder(images.files, _transform(images))
    loader = DataLoader(dataset, images.batch, shuffle=True, num_workers=0, drop_last=True)
    return Side("ImageFolder + DataLoader, float", _counted(lambda: loader))


def _streaming(images: ImageSet, folder: Path) -> Side:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streaming: Any = importlib.import_module("streaming")
    local = folder / f"{images.name} mds"
    with streaming.MDSWriter(out=str(local), columns={"image": "jpeg", "label": "int"}) as writer:
        for number, label in enumerate(images.shards.classes):
            for path in sorted((images.files / label).iterdir()):
                with Image.open(path) as image:  # of an opened file the bytes are kept
                    writer.write({"image": image, "label": number})
    transform = _transform(images)
    base: Any = streaming.StreamingDataset

    class Images(base):
        def __getitem__(self, at: int) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return transform(sample["image"].convert("RGB")), sample["label"]

    streaming.base.util.clean_stale_shared_memory()
    dataset = Images(local=str(local), shuffle=True, batch_size=images.batch)
    loader: Iterable[Any] = DataLoader(dataset, images.batch, num_workers=0, drop_last=True)
    return Side("mosaicml-streaming, float", _counted(lambda: loader), streaming.base.util.clean_stale_shared_memory)


def _dali(images: ImageSet, folder: Path) -> Side:
    """Not antialiased, which is its faster way; nothing runs ahead into another side's time."""
    codecs = importlib.import_module("nvidia.nvimgcodec")
    ctypes.CDLL(str(Path(codecs.__path__[0], "libnvimgcodec.so.0")), ctypes.RTLD_GLOBAL)  # where DALI looks for it
    dali = importlib.import_module("nvidia.dali")
    fn, types = importlib.import_module("nvidia.dali.fn"), dali.types

    @dali.pipeline_def(
        batch_size=images.batch, num_threads=1, device_id=None, seed=0, exec_async=False, exec_pipelined=False
    )
    def graph() -> tuple[Any, Any]:
        files, labels = fn.readers.webdataset(
            paths=images.tars, ext=["jpg", "cls"], random_shuffle=True, initial_fill=_SHUFFLED
        )
        if images.crop == "random_resized_crop":
            pixels = fn.decoders.image_random_crop(files, device="cpu", output_type=types.RGB)
            pixels = fn.resize(pixels, size=(images.size, images.size), antialias=False)
        else:
            padding = images.size // 8
            start = fn.random.uniform(range=(-padding, padding + 1), shape=2)
            pixels = fn.decoders.image(files, device="cpu", output_type=types.RGB)
            pixels = fn.slice(
                pixels,
                start=fn.cast(dali.math.floor(start), dtype=types.INT32),
                shape=(images.size, images.size),
                axes=(0, 1),
                out_of_bounds_policy="pad",
            )
        return fn.flip(pixels, horizontal=fn.random.coin_flip()), labels

    built = graph()
    built.build()

    def run() -> int:
        count = 0
        for _ in range(images.images // images.batch):
            batch, _ = built.run()
            count += len(batch.as_array())
        return count

    run()  # what it cannot do shows here
    return Side("DALI on the CPU, uint8", run)
