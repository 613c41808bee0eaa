"""From a configuration to its data: the opened splits, and what turns them into batches on the device."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from oat_dist.batch import Batch
from oat_dist.config_checks import check_floor
from oat_dist.config_keys import Config, DataConfig
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.decoded_cache import DecodedCache, open_decoded_cache
from oat_dist.data.images.pipeline import ImagePipeline, parse_augment
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.loader import TrainLoader
from oat_dist.data.mixing import Mixing, blend
from oat_dist.data.plan import Layout
from oat_dist.data.remote.fetch import is_url, join_location, local_path
from oat_dist.data.remote.shard_cache import default_cache_dir
from oat_dist.data.stream import StreamBuilder, StreamLoader, StreamSet
from oat_dist.data.windows import ShardWindows
from oat_dist.distributed import World
from oat_dist.errors import ConfigError, DataError

__all__ = ["DataParts", "build_data", "open_location", "open_splits"]


@dataclass(frozen=True)
class DataParts:
    """The opened splits and what turns the training split into batches on the device."""

    train_set: ShardSet | StreamSet
    eval_set: ShardSet | None
    loader: TrainLoader | StreamLoader
    normalise: Normalise
    eval_pipeline: ImagePipeline
    eval_decoded: DecodedCache | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def builder(self) -> BatchBuilder | StreamBuilder:
        return self.loader.builder

    def images(self, batch: Batch) -> Tensor:
        """A batch's images (B, 3, S, S) as the network takes them."""
        images_BCHW = self.normalise(batch.images_BHWC)
        return images_BCHW if batch.mix is None else blend(images_BCHW, batch.mix)

    def keep_decoded(self) -> None:
        """Mark caches of decoded images that are complete by now."""
        for cache in (getattr(self.builder, "decoded", None), self.eval_decoded):
            if cache is not None:
                cache.keep()

    def new_bad(self, known: dict[Any, str], world: World) -> list[str]:
        """Describe the undecodable samples of all ranks that are not among the `known` ones, and add them there."""
        before = set(known)
        for found in world.gather_objects(dict(self.builder.bad)):
            known.update(found)
        return [self.train_set.describe(sample_id) for sample_id in sorted(known.keys() - before)]

    def close(self) -> None:
        """Let go of open shards."""
        self.keep_decoded()
        self.builder.close()


def build_data(config: Config, world: World) -> DataParts:
    """Open the splits and deal the training split over the ranks.

    Raises:
        OatError: on every rank, when data and configuration do not fit together.
    """
    data, notes = config.data, []
    train_set, eval_set = world.together(open_splits, data)
    check_floor(config, len(train_set.classes))
    layout = Layout(
        config.batch_size,
        world.size,
        config.micro_batch_size,
        unit=_unit(config),
        drop_last=data.drop_last,
        whole_shares=config.anchor.span == "step",
    )
    pipeline = ImagePipeline(
        data.image_size,
        data.crop,
        parse_augment(data.augment),
        config.seed,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_ratio=(data.crop_ratio[0], data.crop_ratio[1]),
    )
    eval_pipeline = ImagePipeline(data.image_size, data.eval_crop, crop_fraction=data.crop_fraction)
    bad: dict[str, Any] = {"on_bad": data.on_bad, "max_bad": data.max_bad, "pin_memory": world.device.type == "cuda"}
    loader: TrainLoader | StreamLoader
    eval_decoded = None if eval_set is None else world.together(_decoded, data, eval_set, eval_pipeline)
    reserved = 0 if eval_decoded is None else eval_decoded.nbytes
    if isinstance(train_set, StreamSet):
        notes.append("note: data.mode=stream draws samples at random: no exact epochs, and no exact resume")
        loader = StreamLoader(
            StreamBuilder(train_set, pipeline, data.stream.image_key, data.stream.label_key, **bad),
            data.stream.urls,
            layout,
            world.rank,
            config.seed,
            data.stream.shuffle,
            data.workers,
            data.prefetch,
        )
    else:
        windows = None
        if data.shuffle_shards is None:
            _refuse_beyond_cache(train_set, eval_set)
        else:
            windows = world.together(ShardWindows, train_set, data.shuffle_shards)
            notes += windows.notes(config.seed)
        mixing = None
        if data.mix != "none":
            mixing = Mixing(data.mix, data.mix_alpha, config.seed)
            if config.pretrain_epochs < config.epochs:
                notes.append(f"note: data.mix={data.mix} in the {config.pretrain_epochs} cross-entropy epochs only")
        train_decoded = world.together(_decoded, data, train_set, pipeline, reserved)
        loader = TrainLoader(
            BatchBuilder(train_set, pipeline, decoded=train_decoded, **bad),
            layout,
            world.rank,
            config.seed,
            data.workers,
            data.prefetch,
            windows,
            mixing,
            config.pretrain_epochs * layout.steps(train_set.num_samples),
        )
    normalise = Normalise(data.mean, data.std, world.device)
    return DataParts(train_set, eval_set, loader, normalise, eval_pipeline, eval_decoded, notes)


def open_splits(data: DataConfig) -> tuple[ShardSet | StreamSet, ShardSet | None]:
    """The training split and the one to evaluate on.

    Raises:
        DataError: a split that cannot be opened, or two of different classes.
    """
    cache = data.cache_dir, data.cache_gb
    eval_set = None if data.eval_split is None else open_location(data.path, data.eval_split, *cache)
    if data.mode == "stream":
        classes = [str(number) for number in range(data.stream.classes)]
        if eval_set is not None:
            if classes and len(classes) != len(eval_set.classes):
                raise DataError(
                    f"data.stream.classes={len(classes)}, but {data.eval_split} of {data.path} has "
                    f"{len(eval_set.classes)} classes; leave data.stream.classes out, or mend one of them"
                )
            classes = eval_set.classes
        return StreamSet(data.stream.urls, classes, data.stream.samples), eval_set
    train_set = open_location(data.path, data.train_split, *cache)
    if eval_set is not None and eval_set.classes != train_set.classes:
        raise DataError(
            f"{data.path}: {data.train_split} and {data.eval_split} differ in their classes; pack them together"
        )
    return train_set, eval_set


def open_location(path: str, split: str, cache_dir: str | None = None, cache_gb: float | None = None) -> ShardSet:
    """One split of a packed set, which is a folder or a URL.

    Raises:
        DataError: it cannot be opened.
    """
    limit = None if cache_gb is None else int(cache_gb * 1e9)
    location = join_location(path, split) if is_url(path) else Path(local_path(path)) / split
    return open_split(location, cache_dir=cache_dir, cache_limit=limit)


def _unit(config: Config) -> int:
    """Samples that stay together when a batch is dealt: anchor groups, and pairs that are mixed."""
    group = config.anchor.group_size if config.anchor.scope == "group" else 1
    return group if config.data.mix == "none" else math.lcm(group, 2)


def _refuse_beyond_cache(shards: ShardSet, eval_set: ShardSet | None) -> None:
    """The whole set is shuffled at once, so every batch needs nearly every shard; evaluation needs its own besides."""
    sizes, limit = [shard.size for shard in shards.remote_shards()], shards.cache.limit
    others = [] if eval_set is None else [shard.size for shard in eval_set.remote_shards()]
    if sizes and limit is not None and sum(sizes + others) > limit:
        # a window, and the next one on its way
        fitting = max(int((limit - sum(others)) / (2 * max(sizes))), 1)
        also = f", and {eval_set.manifest.split} {sum(others) / 1e9:.3g} GB" if eval_set is not None else ""
        raise ConfigError(
            f"{shards.where} has {sum(sizes) / 1e9:.3g} GB{also}, more than data.cache_gb={limit / 1e9:g} holds: "
            "shards would be fetched again for every batch; use "
            f"data.shuffle_shards={fitting}, or a larger data.cache_gb"
        )


def _decoded(data: DataConfig, shards: ShardSet, pipeline: ImagePipeline, reserved: int = 0) -> DecodedCache | None:
    folder, processes = default_cache_dir(data.cache_dir) / "decoded", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return open_decoded_cache(data.decoded_cache, shards, pipeline, folder, processes, reserved)
