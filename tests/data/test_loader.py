"""The loader on real shards: any position, any number of ranks, threads and batches ahead, and every bad end."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from oat_dist.batch import Batch, Window
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.images.pipeline import ImagePipeline, parse_augment
from oat_dist.data.images.transforms import flips, squash
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.loader import TrainLoader, evaluation_batches
from oat_dist.data.packing.samples import Sample
from oat_dist.data.plan import EpochOrder, Layout, fingerprint
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

PhotoMaker = Callable[..., ShardSet]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("oat-loader", "oat-evaluation"))]


def train_loader(shards: ShardSet, layout: Layout, rank: int = 0, *, size: int = 8, **options: Any) -> TrainLoader:
    own = {key: options.pop(key) for key in ("on_bad", "max_bad") if key in options}
    seed = options.pop("seed", 3)
    pipeline = ImagePipeline(size, augment=parse_augment(options.pop("augment", "none")), seed=seed)
    return TrainLoader(BatchBuilder(shards, pipeline, **own), layout, rank, seed, **options)


def run(loader: TrainLoader, first: int, last: int) -> list[Window]:
    windows = list(loader.windows(first, last))
    loader.builder.close()
    return windows


def ids_of(window: Window) -> list[int]:
    """Ids of a rank's window, stand-ins left out."""
    return [i for batch in window.batches if not batch.empty for i in batch.ids_B.tolist()]


def equal_batches(a: Batch, b: Batch) -> bool:
    valid = (a.valid_B is None) == (b.valid_B is None) and (a.valid_B is None or torch.equal(a.valid_B, b.valid_B))
    tensors = ("images_BHWC", "labels_B", "ids_B")
    return valid and a.empty == b.empty and all(torch.equal(getattr(a, key), getattr(b, key)) for key in tensors)


def equal_windows(a: Window, b: Window) -> bool:
    facts = ("num_samples", "num_valid", "fingerprint", "epoch", "step_in_epoch")
    return (
        len(a.batches) == len(b.batches)
        and all(map(equal_batches, a.batches, b.batches))
        and all(getattr(a, key) == getattr(b, key) for key in facts)
    )


def spoil(shards: ShardSet, sample_id: int) -> None:
    """Overwrite a sample inside its shard; sizes stay, so only decoding can tell."""
    index = shards.index
    path = shards.folder / shards.manifest.shards[int(index.shard[sample_id])].name
    with path.open("r+b") as file:
        file.seek(int(index.offset[sample_id]))
        file.write(b"\xff\xd8 no image".ljust(int(index.length[sample_id]), b"."))


# Contents


def test_png_pixels_and_labels_are_those_of_the_source(digits: dict[str, ShardSet]) -> None:
    from sklearn.datasets import load_digits

    test = digits["test"]
    source = load_digits()
    (window,) = run(train_loader(test, Layout(len(test), 1)), 0, 1)
    (batch,) = window.batches
    assert batch.images_BHWC.dtype == torch.uint8 and batch.images_BHWC.shape == (len(test), 8, 8, 3)
    assert batch.valid_B is None and batch.num_valid == window.num_valid == window.num_samples == len(test)
    for image_HWC, label, sample_id in zip(batch.images_BHWC, batch.labels_B, batch.ids_B, strict=True):
        number = int(test.index.name(int(sample_id)).split("/")[1].split(".")[0])  # "3/0042.png"
        grey_HW = (source.images[number].astype(int) * 255 + 8) // 16
        assert np.array_equal(image_HWC.numpy(), np.repeat(grey_HW[:, :, None], 3, axis=2))
        assert int(label) == source.target[number]


def test_jpeg_pixels_are_simplejpegs_and_labels_the_classes(cifar: ShardSet, cifar_samples: list[Sample]) -> None:
    by_name = {sample.name: sample for sample in cifar_samples}
    (window,) = run(train_loader(cifar, Layout(len(cifar), 1), size=32), 0, 1)
    (batch,) = window.batches
    assert sorted(batch.ids_B.tolist()) == list(range(120))
    for image_HWC, label, sample_id in zip(batch.images_BHWC, batch.labels_B, batch.ids_B, strict=True):
        sample = by_name[cifar.index.name(int(sample_id))]
        assert np.array_equal(image_HWC.numpy(), simplejpeg.decode_jpeg(sample.data, colorspace="RGB"))
        assert cifar.classes[int(label)] == sample.label


def test_photos_of_mixed_sizes_are_squashed(make_photos: PhotoMaker) -> None:
    shards = make_photos(20)
    (window,) = run(train_loader(shards, Layout(20, 1), size=24), 0, 1)
    reader = ShardReader(shards)
    for image_HWC, sample_id in zip(window.batches[0].images_BHWC, window.batches[0].ids_B.tolist(), strict=True):
        data = reader.read(sample_id)
        if shards.index.name(sample_id).endswith("png"):
            expected = np.asarray(Image.open(io.BytesIO(data)).resize((24, 24), Image.Resampling.BILINEAR))
        else:
            expected = squash(simplejpeg.decode_jpeg(data, colorspace="RGB"), 24)
        assert np.array_equal(image_HWC.numpy(), expected)
    reader.close()


def test_images_are_mirrored_by_seed_epoch_and_id_alone(cifar: ShardSet) -> None:
    def images(augment: str, seed: int, layout: Layout) -> dict[tuple[int, int], np.ndarray]:
        found = {}
        for rank in range(layout.world):
            loader = train_loader(cifar, layout, rank, size=32, seed=seed, augment=augment)
            for window in run(loader, 0, 2 * loader.steps_per_epoch):
                for batch in window.batches:
                    pairs = zip(batch.ids_B.tolist(), batch.images_BHWC.numpy(), strict=True)
                    found.update({(window.epoch, i): image for i, image in pairs if not batch.empty})
        return found

    plain = images("none", 3, Layout(50, 1))
    mirrored = images("flip", 3, Layout(50, 1))
    dealt = images("flip", 3, Layout(17, 3, 2))
    other_seed = images("flip", 4, Layout(50, 1))
    assert plain.keys() == mirrored.keys() == dealt.keys() == {(e, i) for e in (0, 1) for i in range(120)}
    for (epoch, sample_id), image in plain.items():
        for seed, found in ((3, mirrored), (3, dealt), (4, other_seed)):
            flipped = flips(np.array([sample_id]), seed, epoch)[0]
            assert np.array_equal(found[epoch, sample_id], image[:, ::-1] if flipped else image)
    changed = [not np.array_equal(mirrored[key], plain[key]) for key in plain]
    assert 80 < sum(changed) < 160  # of 240
    assert any(not np.array_equal(mirrored[key], other_seed[key]) for key in plain)


# Order


def test_epochs_follow_each_other(digits: dict[str, ShardSet]) -> None:
    test = digits["test"]  # 363 samples or so: a short last batch
    loader = train_loader(test, Layout(100, 1, 30))
    windows = run(loader, 0, 3 * loader.steps_per_epoch)
    n = len(test)
    assert loader.steps_per_epoch == 4 and n % 100
    assert [(w.epoch, w.step_in_epoch) for w in windows] == [(e, s) for e in range(3) for s in range(4)]
    assert [w.num_samples for w in windows] == [100, 100, 100, n - 300] * 3
    # 100 samples in four micro-batches of at most 30, the short rest in three
    assert [len(w.batches) for w in windows] == [4, 4, 4, -(-(n - 300) // 30)] * 3
    for epoch in range(3):
        of_epoch = [i for w in windows if w.epoch == epoch for i in ids_of(w)]
        assert of_epoch == EpochOrder(n, 3, epoch).ids(0, n).tolist()
        assert sorted(of_epoch) == list(range(n))
        total = sum(w.fingerprint for w in windows if w.epoch == epoch) % 2**64
        assert total == fingerprint(epoch, 0, np.array(of_epoch), test.digest)


def test_drop_last_leaves_out_the_tail_only(digits: dict[str, ShardSet]) -> None:
    test = digits["test"]
    loader = train_loader(test, Layout(100, 2, drop_last=True), 1)
    windows = run(loader, 0, 4)
    assert loader.steps_per_epoch == 3
    assert [(w.epoch, w.step_in_epoch, w.num_samples) for w in windows][2:] == [(0, 2, 100), (1, 0, 100)]
    assert ids_of(windows[3]) == EpochOrder(len(test), 3, 1).ids(50, 100).tolist()


def test_any_start_gives_the_tail_of_the_whole_run(make_photos: PhotoMaker) -> None:
    shards = make_photos(29)
    layout = Layout(8, 1, 3)  # micro-batches of 3, 3, 2; the last batch of an epoch is one of 3, 2
    whole = run(train_loader(shards, layout, augment="flip"), 0, 9)
    assert [len(w.batches) for w in whole] == [3, 3, 3, 2, 3, 3, 3, 2, 3]
    for first in range(10):
        tail = run(train_loader(shards, layout, augment="flip"), first, 9)
        assert len(tail) == 9 - first and all(map(equal_windows, tail, whole[first:]))
    other = run(train_loader(shards, layout, augment="flip", seed=4), 0, 1)  # the comparison can fail
    assert not equal_windows(other[0], whole[0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 8, 100])
def test_threads_and_batches_ahead_change_nothing(make_photos: PhotoMaker, workers: int, prefetch: int) -> None:
    shards = make_photos(29)
    layout = Layout(8, 2, 3)
    expected = run(train_loader(shards, layout, 1, augment="flip"), 0, 9)
    got = run(train_loader(shards, layout, 1, augment="flip", workers=workers, prefetch=prefetch), 0, 9)
    assert len(got) == 9 and all(map(equal_windows, got, expected))


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(("batch_size", "unit"), [(20, 1), (24, 4)])
def test_all_ranks_together_see_one_order(
    make_photos: PhotoMaker, batch_size: int, unit: int, micro_batch_size: int | None
) -> None:
    shards = make_photos(50)
    steps = 6
    runs = {}
    for world in (1, 2, 3):
        layout = Layout(batch_size, world, micro_batch_size, unit)
        ranks = [run(train_loader(shards, layout, rank), 0, steps) for rank in range(world)]
        together = []
        for windows in zip(*ranks, strict=True):
            assert len({len(w.batches) for w in windows}) == 1  # as many forward passes on every rank
            assert {w.num_samples for w in windows} == {sum(len(ids_of(w)) for w in windows)}
            assert {w.num_samples for w in windows} == {sum(w.num_valid for w in windows)}
            micro_batches = zip(*(w.batches for w in windows), strict=True)
            ids = [i for row in micro_batches for batch in row if not batch.empty for i in batch.ids_B.tolist()]
            together.append((ids, sum(w.fingerprint for w in windows) % 2**64))
        runs[world] = together
    assert runs[1] == runs[2] == runs[3]
    order = EpochOrder(50, 3, 0).ids(0, 50)
    assert [i for ids, _ in runs[3][:3] for i in ids] == order.tolist()
    assert sum(value for _, value in runs[3][:3]) % 2**64 == fingerprint(0, 0, order, shards.digest)


def test_a_rank_without_samples_runs_a_masked_stand_in(make_photos: PhotoMaker) -> None:
    shards = make_photos(9)
    layout = Layout(8, 3)  # the last batch holds one sample: for rank 0
    ranks = [run(train_loader(shards, layout, rank), 0, 2) for rank in range(3)]
    for rank, (full, short) in enumerate(ranks):
        assert not full.batches[0].empty and full.batches[0].valid_B is None
        (batch,) = short.batches
        assert short.num_samples == 1
        if rank == 0:
            assert not batch.empty and short.num_valid == 1
            continue
        assert batch.empty and batch.valid_B is not None and not batch.valid_B.any()
        assert len(batch) == 1 and batch.images_BHWC.shape == (1, 8, 8, 3) and batch.num_valid == 0
        assert short.num_valid == 0 and short.fingerprint == 0


def test_a_full_batch_may_leave_a_stand_in_in_its_last_micro_batch_only(make_photos: PhotoMaker) -> None:
    shards = make_photos(9)
    windows = run(train_loader(shards, Layout(9, 2, 2), 1), 0, 1)
    assert [batch.empty for batch in windows[0].batches] == [False, False, True]
    assert windows[0].num_valid == 4


# Bad images and shards


def test_stop_names_the_image_the_shard_and_the_remedy(make_photos: PhotoMaker) -> None:
    shards = make_photos(30)
    victim = int(EpochOrder(30, 3, 0).ids(17, 18)[0])
    spoil(shards, victim)
    loader = train_loader(shards, Layout(5, 1))
    windows = loader.windows(0, 6)
    good = [next(windows) for _ in range(3)]  # batches before the bad one come out, though it was met ahead of need
    assert [i for w in good for i in ids_of(w)] == EpochOrder(30, 3, 0).ids(0, 15).tolist()
    with pytest.raises(DataError) as caught:
        next(windows)
    text = str(caught.value)
    shard = shards.folder / shards.manifest.shards[int(shards.index.shard[victim])].name
    for part in (f"'{shards.index.name(victim)}'", f"sample {victim}", str(shard), "data.on_bad=skip", "--on-bad skip"):
        assert part in text
    assert "\n" not in text
    assert loader_threads() == []  # although the generator and its error are still referred to
    loader.builder.close()


def test_skip_masks_exactly_the_bad_samples(make_photos: PhotoMaker) -> None:
    good = run(train_loader(make_photos(30), Layout(10, 1, 4), augment="flip"), 0, 6)
    shards = make_photos(30, split="bad")
    bad = {4, 11, 29}
    for sample_id in bad:
        spoil(shards, sample_id)
    loader = train_loader(shards, Layout(10, 1, 4), augment="flip", on_bad="skip", max_bad=3)
    windows = run(loader, 0, 6)
    assert loader.builder.bad.keys() == bad and all(loader.builder.bad.values())
    for ours, whole in zip(windows, good, strict=True):
        # the same samples in the same slots; the fingerprint differs only by the digest of the set
        assert ids_of(ours) == ids_of(whole) and ours.num_samples == whole.num_samples == 10
        assert ours.num_valid == 10 - len(bad & set(ids_of(ours)))
        start = ours.step_in_epoch * 10
        assert ours.fingerprint == fingerprint(ours.epoch, start, np.array(ids_of(ours)), shards.digest)
        for batch, reference in zip(ours.batches, whole.batches, strict=True):
            expected = [i not in bad for i in batch.ids_B.tolist()]
            assert (batch.valid_B is None) == all(expected)
            if batch.valid_B is None:
                assert equal_batches(batch, reference)
                continue
            assert batch.valid_B.tolist() == expected and not batch.empty
            assert torch.equal(batch.labels_B, reference.labels_B)
            assert torch.equal(batch.images_BHWC[batch.valid_B], reference.images_BHWC[batch.valid_B])
            # what stands in the masked slot is a good neighbour, perhaps mirrored
            good = batch.images_BHWC[batch.valid_B][0]
            for image in batch.images_BHWC[~batch.valid_B]:
                assert torch.equal(image, good) or torch.equal(image, good.flip(1))


def test_a_batch_of_bad_images_only_is_all_masked(make_photos: PhotoMaker) -> None:
    shards = make_photos(4)
    for sample_id in range(4):
        spoil(shards, sample_id)
    (window,) = run(train_loader(shards, Layout(4, 1, 2), on_bad="skip", max_bad=4), 0, 1)
    for batch in window.batches:
        assert batch.valid_B is not None and not batch.valid_B.any() and not batch.empty
        assert not batch.images_BHWC.any()
    assert window.num_valid == 0 and window.num_samples == 4


def test_skip_stops_beyond_its_budget(make_photos: PhotoMaker) -> None:
    shards = make_photos(30)
    for sample_id in (4, 11, 29):
        spoil(shards, sample_id)
    loader = train_loader(shards, Layout(10, 1, 4), on_bad="skip", max_bad=2)
    with pytest.raises(DataError, match=r"more undecodable images than data.max_bad=2 allows.*shards/verify.py"):
        run(loader, 0, 3)
    loader.builder.close()
    # the same three in every epoch are three, not three an epoch
    enough = train_loader(shards, Layout(10, 1, 4), on_bad="skip", max_bad=3)
    assert len(run(enough, 0, 15)) == 15


TRUNCATE_WHILE_READING = """
import os, sys
from oat_dist.data.index import open_split
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.loader import TrainLoader
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.plan import Layout
from oat_dist.errors import run_command

def main():
    shards = open_split(sys.argv[1])
    loader = TrainLoader(BatchBuilder(shards, ImagePipeline(8), on_bad="skip", max_bad=1000), Layout(4, 1), 0, 3)
    for step, window in enumerate(loader.windows(0, 1000)):
        if step == 5:
            os.truncate(shards.folder / shards.manifest.shards[1].name, 700)
    print("read on to the end")
    return 0

sys.exit(run_command(main))
"""


def test_a_shard_cut_short_during_a_run_ends_it_with_one_line(make_photos: PhotoMaker) -> None:
    """In a process of its own, which a memory map would have killed with SIGBUS; never skipped as a bad image."""
    shards = make_photos(40)
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATE_WHILE_READING, str(shards.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert shards.manifest.shards[1].name in done.stderr and "cut short" in done.stderr
    with pytest.raises(DataError, match="cut short or replaced"):  # and the next start sees it at once
        open_split(shards.folder)


# Threads


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_a_consumer_that_stops_early_leaves_no_thread(make_photos: PhotoMaker, consumed: int) -> None:
    loader = train_loader(make_photos(40), Layout(4, 1), workers=3, prefetch=20)
    windows = loader.windows(0, 10_000_000_000)
    for _ in range(consumed):
        next(windows)
    assert (loader_threads() != []) == (consumed > 0)
    windows.close()
    assert loader_threads() == []
    loader.builder.close()


def test_what_was_queued_is_dropped_not_finished(make_photos: PhotoMaker) -> None:
    loader = train_loader(make_photos(40), Layout(40, 1), size=64, workers=1, prefetch=4000)  # half a minute of work
    windows = loader.windows(0, 10_000)
    next(windows)
    started = time.monotonic()
    windows.close()
    assert time.monotonic() - started < 3
    loader.builder.close()


def test_an_abandoned_generator_leaves_no_thread(make_photos: PhotoMaker) -> None:
    loader = train_loader(make_photos(40), Layout(4, 1))
    for window in loader.windows(0, 1000):
        assert window.step_in_epoch == 0
        break
    assert loader_threads() == []
    loader.builder.close()


def test_a_failed_run_can_go_on_with_a_new_generator(make_photos: PhotoMaker) -> None:
    shards = make_photos(20)
    path = shards.folder / shards.manifest.shards[0].name
    loader = train_loader(shards, Layout(5, 1), workers=3)
    expected = run(loader, 0, 4)
    path.rename(path.with_suffix(".away"))
    with pytest.raises(DataError, match=path.name):
        run(loader, 0, 4)
    assert loader_threads() == []
    path.with_suffix(".away").rename(path)
    assert all(map(equal_windows, run(loader, 0, 4), expected))


def test_two_generators_of_one_loader_do_not_disturb_each_other(make_photos: PhotoMaker) -> None:
    loader = train_loader(make_photos(40), Layout(8, 1), workers=3, prefetch=4)
    pairs = list(zip(loader.windows(0, 12), loader.windows(0, 12), strict=True))
    loader.builder.close()
    assert len(pairs) == 12 and all(equal_windows(a, b) for a, b in pairs)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_sees_everything_once_in_as_many_batches_on_every_rank(
    make_photos: PhotoMaker, world: int, batch_size: int
) -> None:
    shards = make_photos(23)
    builder = BatchBuilder(shards, ImagePipeline(8))
    ranks = [list(evaluation_batches(builder, rank, world, batch_size)) for rank in range(world)]
    builder.close()
    assert len({len(batches) for batches in ranks}) == 1
    largest = (23 + world - 1) // world
    assert len(ranks[0]) == (largest + batch_size - 1) // batch_size
    assert all(1 <= len(batch) <= batch_size for batches in ranks for batch in batches)
    seen = [i for batches in ranks for batch in batches if not batch.empty for i in batch.ids_B.tolist()]
    assert seen == list(range(23))
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.num_valid == (0 if batch.empty else len(batch))
        if not batch.empty:
            assert batch.labels_B.tolist() == shards.index.label[batch.ids_B.numpy()].tolist()


def test_more_ranks_than_samples_still_keep_step(make_photos: PhotoMaker) -> None:
    builder = BatchBuilder(make_photos(3), ImagePipeline(8))
    ranks = [list(evaluation_batches(builder, rank, 5, 4)) for rank in range(5)]
    builder.close()
    assert [len(batches) for batches in ranks] == [1] * 5
    assert sorted(i for (batch,) in ranks if not batch.empty for i in batch.ids_B.tolist()) == [0, 1, 2]
    assert sum(batch.empty for (batch,) in ranks) == 2


def test_evaluation_does_not_depend_on_threads_and_does_not_mirror(make_photos: PhotoMaker) -> None:
    shards = make_photos(23)
    builder = BatchBuilder(shards, ImagePipeline(8))
    one, three = (list(evaluation_batches(builder, 0, 1, 4, workers)) for workers in (1, 3))
    (training,) = run(train_loader(shards, Layout(23, 1)), 0, 1)
    builder.close()
    assert all(map(equal_batches, one, three))
    by_id = dict(zip(training.batches[0].ids_B.tolist(), training.batches[0].images_BHWC, strict=True))
    assert all(
        torch.equal(image, by_id[4 * b + i]) for b, batch in enumerate(one) for i, image in enumerate(batch.images_BHWC)
    )


def test_evaluation_masks_bad_images_and_stops_cleanly(make_photos: PhotoMaker) -> None:
    shards = make_photos(23)
    spoil(shards, 6)
    builder = BatchBuilder(shards, ImagePipeline(8), on_bad="skip", max_bad=23)
    batches = list(evaluation_batches(builder, 0, 1, 4))
    assert [batch.num_valid for batch in batches] == [4, 3, 4, 4, 4, 3]
    assert builder.bad.keys() == {6}
    early = evaluation_batches(builder, 0, 1, 1)
    next(early)
    early.close()
    assert loader_threads() == []
    builder.close()
    strict = BatchBuilder(shards, ImagePipeline(8))
    with pytest.raises(DataError, match="sample 6"):
        list(evaluation_batches(strict, 0, 1, 4))
    assert loader_threads() == []
    strict.close()
