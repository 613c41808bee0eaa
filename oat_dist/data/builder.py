"""From sample ids to one `Batch`: read, decode, crop, write into the slots of one uint8 buffer, augment.

A sample that cannot be decoded stops the run, or keeps its slot masked (``valid=False``), within a budget; the other
ranks and the order are not affected. A sample that cannot be *read* always stops it: that is no fault of the sample.
"""

from __future__ import annotations

import contextlib
import weakref

import numpy as np
import torch

from oat_dist.batch import Batch
from oat_dist.data.decoded_cache import DecodedCache
from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.index import ShardSet
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

__all__ = ["ON_BAD", "BatchBuilder"]

ON_BAD = ("stop", "skip")


class BatchBuilder:
    """Turns sample ids into a `Batch`. Called from several threads.

    Args:
        shards: the opened split.
        pipeline: what is done to each image; images come out (S, S, 3), S its size.
        on_bad: "stop" raises at the first undecodable image; "skip" masks up to `max_bad` different ones.
        pin_memory: whether buffers are page-locked, for copies to a GPU that do not wait.
        decoded: where decoded images are kept; None: nowhere. Closed by its owner.
    """

    def __init__(
        self,
        shards: ShardSet,
        pipeline: ImagePipeline,
        *,
        on_bad: str = "stop",
        max_bad: int = 0,
        pin_memory: bool = False,
        decoded: DecodedCache | None = None,
    ) -> None:
        self.shards = shards
        self.pipeline = pipeline
        self.on_bad = on_bad
        self.max_bad = max_bad
        self.pin_memory = pin_memory
        self.decoded = decoded
        self.bad: dict[int, str] = {}  # sample id -> why
        self.reader = ShardReader(shards)
        self._unused: list[np.ndarray] = []  # blocks of pixels whose batches are gone

    def build(self, ids_B: np.ndarray, epoch: int = 0) -> Batch:
        """Read, decode and place the samples of one micro-batch, in order, as they are in this epoch."""
        images_BHWC = self._buffer(len(ids_B))
        view_BHWC = images_BHWC.numpy()
        bad, valid_B = self._fill(view_BHWC, ids_B, epoch), None
        if bad:
            valid_B = np.ones(len(ids_B), dtype=bool)
            valid_B[bad] = False
            # BatchNorm sees every slot: a copy of a good neighbour does it less harm than grey.
            view_BHWC[bad] = view_BHWC[valid_B.argmax()] if valid_B.any() else 0
        self.pipeline.finish(view_BHWC, ids_B, epoch)
        return Batch(
            images_BHWC,
            torch.from_numpy(self._labels(ids_B)),
            torch.from_numpy(ids_B.astype(np.int64)),
            None if valid_B is None else torch.from_numpy(valid_B),
        )

    def stand_in(self) -> Batch:
        """One masked sample, for a rank that has none in this micro-batch but must keep in step."""
        zero_1 = torch.zeros(1, dtype=torch.int64)
        image_1HWC = self._buffer(1).zero_()
        return Batch(image_1HWC, zero_1, zero_1, torch.zeros(1, dtype=torch.bool), empty=True)

    def close(self) -> None:
        self.reader.close()

    def _buffer(self, number: int) -> torch.Tensor:
        """Memory for (number, S, S, 3) uint8, not cleared; used again once no tensor is left on it.

        Malloc would give it back to the system and take it anew, page by page, at a tenth of the cost of decoding.
        """
        size = self.pipeline.size
        if self.pin_memory:  # torch itself uses page-locked memory again
            return torch.empty((number, size, size, 3), dtype=torch.uint8, pin_memory=True)
        block_BHWC = np.empty((0, size, size, 3), dtype=np.uint8)
        with contextlib.suppress(IndexError):  # several threads take from it
            block_BHWC = self._unused.pop()
        if len(block_BHWC) < number:
            block_BHWC = torch.empty((number, size, size, 3), dtype=torch.uint8).numpy()
        view_BHWC = block_BHWC[:number]  # kept alive by every tensor on it, and by nothing else
        weakref.finalize(view_BHWC, self._unused.append, block_BHWC).atexit = False
        return torch.from_numpy(view_BHWC)

    def _fill(self, view_BHWC: np.ndarray, ids_B: np.ndarray, epoch: int) -> list[int]:
        """Write every image into its slot; the slots of those that could not be decoded."""
        slots = list(range(len(ids_B)))
        bad: list[int] = []
        final = self.decoded if self.decoded is not None and self.decoded.final else None
        if final is not None:
            slots = np.flatnonzero(~final.take(ids_B, view_BHWC)).tolist()
            if not slots:
                return bad
        index = self.shards.index
        boxes_B4 = self.pipeline.boxes(ids_B, index.width[ids_B], index.height[ids_B], epoch)
        boxes = [None] * len(ids_B) if boxes_B4 is None else boxes_B4.tolist()
        for slot in slots:
            sample_id = int(ids_B[slot])
            try:
                self._place(sample_id, boxes[slot], view_BHWC[slot])
            except ImageError as error:
                self._refuse_or_record(sample_id, str(error))
                bad.append(slot)
                continue
            if final is not None:
                final.put(sample_id, view_BHWC[slot])
        return bad

    def _place(self, sample_id: int, box: list[int] | None, slot_SSC: np.ndarray) -> None:
        """Write one image (S, S, 3) into its slot, before augmentation."""
        if self.decoded is None or self.decoded.final:
            self.pipeline.read(self.reader.read(sample_id), box, slot_SSC)
            return
        whole_HWC = self.decoded.get(sample_id)
        if whole_HWC is None:
            whole_HWC = decode_rgb(self.reader.read(sample_id))
            self.decoded.put(sample_id, whole_HWC)
        self.pipeline.from_decoded(whole_HWC, box, slot_SSC)

    def _labels(self, ids_B: np.ndarray) -> np.ndarray:
        labels_B = self.shards.index.label[ids_B].astype(np.int64)
        # A mapped index is not checked when it is opened. Below zero is, without a sign, beyond every class.
        wrong_B = labels_B.view(np.uint64) >= len(self.shards.classes)
        if wrong_B.any():
            slot = int(np.flatnonzero(wrong_B)[0])
            raise DataError(
                f"{self.shards.describe(int(ids_B[slot]))}: label {labels_B[slot]} is out of range for "
                f"{len(self.shards.classes)} classes; mend the labels and pack again"
            )
        return labels_B

    def _refuse_or_record(self, sample_id: int, reason: str) -> None:
        where = f"{self.shards.describe(sample_id)} cannot be decoded: {reason}"
        if self.on_bad == "stop":
            raise DataError(f"{where}; pack again without it (--on-bad skip), or train with data.on_bad=skip")
        self.bad[sample_id] = reason
        if len(self.bad) > self.max_bad:
            raise DataError(
                f"{where}; these are more undecodable images than data.max_bad={self.max_bad} allows; "
                "run shards/verify.py on the data set"
            )
