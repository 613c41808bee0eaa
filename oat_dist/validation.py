"""A network over a packed split, under every protocol: shared by training and the evaluate command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oat_dist.batch import Batch
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.decoded_cache import DecodedCache
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import ShardSet
from oat_dist.data.loader import evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluate import Outputs, collect, judge
from oat_dist.fp32 import exact_fp32
from oat_dist.results import Evaluation

__all__ = ["evaluate_network", "network_outputs"]


def network_outputs(
    network: nn.Module,
    shards: ShardSet,
    normalise: Normalise,
    world: World,
    *,
    pipeline: ImagePipeline,
    batch_size: int = 256,
    workers: int = 2,
    on_bad: str = "skip",
    max_bad: int | None = None,
    decoded: DecodedCache | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Outputs | None:
    """Forward a whole split once: the outputs of every sample on rank 0, None on the others.

    Args:
        network: on the device, in any mode (restored afterwards); the same on every rank.
        pipeline: what is done to each image.
        batch_size: of the forward pass on each rank; changes speed only.
        on_bad: "stop" at an undecodable image, or "skip" up to `max_bad` of them on each rank (None: any number).
        decoded: where decoded images are kept; None: nowhere.
        on_batch: called before each batch, equally often on every rank; an error it raises on all of them ends it.

    Raises:
        DataError: an undecodable image and ``on_bad="stop"``, or more of them than `max_bad`.
    """
    budget = shards.num_samples if max_bad is None else max_bad
    builder = BatchBuilder(shards, pipeline, on_bad=on_bad, max_bad=budget, decoded=decoded)
    training = network.training
    network.eval()

    def forward(batch: Batch) -> Tensor:
        if on_batch is not None:
            on_batch()
        return network(normalise(batch.images_BHWC))

    batches = evaluation_batches(builder, world.rank, world.size, batch_size, workers)
    try:
        with exact_fp32(world.device):
            return collect(forward, batches, shards.num_samples, world)
    finally:
        network.train(training)
        builder.close()


def evaluate_network(
    network: nn.Module,
    shards: ShardSet,
    normalise: Normalise,
    world: World,
    *,
    judged: Mapping[str, Any],
    **forward: Any,
) -> Evaluation | None:
    """`network_outputs` and `judge`: forward a whole split once and judge it; on rank 0, None on the others.

    Args:
        judged: the keyword arguments of `judge`.
        forward: what `network_outputs` takes besides.

    Raises:
        DataError: as `network_outputs`, or when no image of the split can be decoded.
    """
    outputs = network_outputs(network, shards, normalise, world, **forward)

    def on_main() -> Evaluation | None:
        if outputs is None:
            return None
        with torch.no_grad():
            return judge(outputs, **judged)

    return world.together(on_main)
