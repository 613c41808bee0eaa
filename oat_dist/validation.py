"""A network over a packed split, under every protocol: shared by training and the evaluate command."""

from __future__ import annotations

from collections.abc import Callable

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
from oat_dist.evaluate import Evaluation, collect, judge

__all__ = ["evaluate_network"]


def evaluate_network(
    network: nn.Module,
    shards: ShardSet,
    normalise: Normalise,
    world: World,
    *,
    pipeline: ImagePipeline,
    center: str | None,
    floor: float,
    stored_anchor_C: Tensor | None,
    batch_size: int = 256,
    workers: int = 2,
    group_size: int = 32,
    seed: int = 0,
    on_bad: str = "skip",
    max_bad: int | None = None,
    decoded: DecodedCache | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Evaluation | None:
    """Forward a whole split once and judge it; the result on rank 0, None on the others.

    Args:
        network: on the device, in any mode (restored afterwards); the same on every rank.
        pipeline: what is done to each image.
        center: of the OAT anchors; None for a network trained with cross-entropy alone.
        batch_size: of the forward pass on each rank; changes speed only.
        on_bad: "stop" at an undecodable image, or "skip" up to `max_bad` of them on each rank (None: any number),
            which are then missing from the result's total.
        decoded: where decoded images are kept; None: nowhere.
        on_batch: called before each batch, equally often on every rank; an error it raises on all of them ends the
            evaluation.

    Raises:
        DataError: an undecodable image and ``on_bad="stop"``, more of them than `max_bad`, or nothing left.
    """
    budget = shards.num_samples if max_bad is None else max_bad
    builder = BatchBuilder(shards, pipeline, on_bad=on_bad, max_bad=budget, decoded=decoded)
    training = network.training
    network.eval()

    def forward(batch: Batch) -> Tensor:
        if on_batch is not None:
            on_batch()
        return network(normalise(batch.images_BHWC))

    try:
        outputs = collect(
            forward,
            evaluation_batches(builder, world.rank, world.size, batch_size, workers),
            shards.num_samples,
            world,
        )
    finally:
        network.train(training)
        builder.close()

    def on_main() -> Evaluation | None:
        if outputs is None:
            return None
        with torch.no_grad():
            return judge(
                outputs,
                center=center,
                floor=floor,
                stored_anchor_C=stored_anchor_C,
                group_size=group_size,
                seed=seed,
            )

    return world.together(on_main)
