"""Images in, answers out, in order: decoding in threads ahead of the network, with little waiting in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from oat_dist.data.images.decode import ImageError, decode_rgb
from oat_dist.data.ordered_map import default_workers
from oat_dist.errors import DataError
from oat_dist.inference.sources import Item
from oat_dist.inference.writers import Ranked
from oat_dist.predict import Answers, OATClassifier

__all__ = ["answer_images"]

_CHUNK_ITEMS, _CHUNK_BYTES = 8, 1 << 20  # handed to a thread at once
_MOST_HELD = 256 << 20  # bytes of files that wait for a thread

Prepared = tuple[Item, np.ndarray | str]


def answer_images(
    classifier: OATClassifier,
    items: Iterable[Item],
    problem: Callable[[str], None],
    *,
    protocol: str = "stored",
    batch_size: int = 64,
    group: int | None = None,
    top: int = 1,
    workers: int | None = None,
) -> Iterator[list[tuple[Item, list[Ranked]]]]:
    """Answers in the order of the items, one list a forward pass.

    Args:
        problem: told, in one line each, which images cannot be read; they are left out.
        group: protocol "batch": every so many images share an anchor; `batch_size` is a multiple of it.
        top: classes of each answer.
        workers: threads; default: the cores this process may use.
    """
    top = min(top, len(classifier.classes))
    batch: list[tuple[Item, np.ndarray]] = []
    for item, prepared in _prepared(classifier, items, batch_size, workers or default_workers()):
        if isinstance(prepared, str):
            problem(f"{item.name}: {prepared}")
            continue
        batch.append((item, prepared))
        if len(batch) == batch_size:
            yield _answered(classifier, batch, protocol, group, top)
            batch = []
    if batch:
        yield _answered(classifier, batch, protocol, group, top)


def _answered(
    classifier: OATClassifier, batch: list[tuple[Item, np.ndarray]], protocol: str, group: int | None, top: int
) -> list[tuple[Item, list[Ranked]]]:
    answers = classifier.answer(np.stack([image_SSC for _, image_SSC in batch]), protocol, group)
    rankings = _rankings(answers, classifier.classes, top)
    return [(item, ranking) for (item, _), ranking in zip(batch, rankings, strict=True)]


def _rankings(answers: Answers, classes: list[str], top: int) -> list[list[Ranked]]:
    best_BK = answers.scores_BC.sort(dim=1, descending=True, stable=True).indices[:, :top]
    chance_BK = answers.probabilities_BC.gather(1, best_BK)
    return [
        [Ranked(classes[label], label, chance) for label, chance in zip(labels, chances, strict=True)]
        for labels, chances in zip(best_BK.tolist(), chance_BK.tolist(), strict=True)
    ]


def _prepared(classifier: OATClassifier, items: Iterable[Item], batch_size: int, workers: int) -> Iterator[Prepared]:
    """Each item with its pixels as the network takes them, or why there are none; about a batch ahead of need."""

    def work(chunk: list[Item]) -> list[Prepared]:
        return [(item, _pixels(classifier, item)) for item in chunk]

    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Future[list[Prepared]], int]] = deque()
    ahead, held = batch_size // _CHUNK_ITEMS + 2 * workers, 0
    try:
        for chunk, size in _chunks(items):
            pending.append((pool.submit(work, chunk), size))
            held += size
            while len(pending) > ahead or (held > _MOST_HELD and pending):
                future, size = pending.popleft()
                held -= size
                yield from future.result()
        while pending:
            yield from pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item]) -> Iterator[tuple[list[Item], int]]:
    """A few items at a time, and the bytes that they hold."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += item.held
        if len(chunk) == _CHUNK_ITEMS or size >= _CHUNK_BYTES:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _pixels(classifier: OATClassifier, item: Item) -> np.ndarray | str:
    try:
        return classifier.pipeline.whole(decode_rgb(item.read()))
    except ImageError as error:
        return f"not an image that can be decoded: {error}"
    except DataError as error:
        text = str(error)
        return text.removeprefix(f"{item.file}: ")
    except MemoryError:
        return "too large for the memory"
