"""Whether reading grows: epoch after epoch of a packed split through the loader, and the resident memory after each.

    python benchmarks/soak.py packed/cifar10/train --epochs 200

Every kind of work takes its turn: plain, with the cache of decoded images (in memory, on disk), with random crops and a
policy. Memory is taken after half of the epochs, when all buffers and caches have had their peaks, and at the end.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import psutil

from oat_dist.data.builder import BatchBuilder
from oat_dist.data.decoded_cache import open_decoded_cache
from oat_dist.data.images.pipeline import ImagePipeline, parse_augment
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.loader import TrainLoader
from oat_dist.data.plan import Layout

KINDS = {
    "squash": ("none", "squash", "flip"),
    "squash, decoded cache in memory": ("ram", "squash", "flip pad_crop"),
    "squash, decoded cache on disk": ("disk", "squash", "flip"),
    "random crops, trivialaugment": ("none", "random_resized_crop", "flip trivialaugment"),
}


def soak(shards: ShardSet, kind: str, epochs: int, size: int = 32, batch: int = 32) -> tuple[int, int]:
    """Resident bytes after half of the epochs, and at the end."""
    cache, crop, augment = KINDS[kind]
    pipeline = ImagePipeline(size, crop, parse_augment(augment))
    with tempfile.TemporaryDirectory() as folder:
        decoded = open_decoded_cache(cache, shards, pipeline, Path(folder))
        builder = BatchBuilder(shards, pipeline, decoded=decoded)
        loader = TrainLoader(builder, Layout(batch, 1), 0, seed=0)
        half, resident = max(epochs // 2, 1), [0, 0]
        for step, _ in enumerate(loader.windows(0, epochs * loader.steps_per_epoch), start=1):
            if step == half * loader.steps_per_epoch:
                resident[0] = _resident()
        resident[1] = _resident()
        builder.close()
    return resident[0], resident[1]


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="folder of a packed split")
    parser.add_argument("--epochs", type=int, default=100, help="of each kind (default %(default)s)")
    arguments = parser.parse_args()
    shards = open_split(arguments.split)
    print(f"{shards.where}: {shards.num_samples:,} samples, {arguments.epochs} epochs of each kind")
    print(f"{'':<34} {'half way':>10} {'end':>10} {'growth':>12}")
    for kind in KINDS:
        before, after = soak(shards, kind, arguments.epochs)
        print(f"{kind:<34} {before / 2**20:>6.0f} MiB {after / 2**20:>6.0f} MiB {(after - before) / 2**10:>+8.0f} KiB")


if __name__ == "__main__":
    main()
