"""An interrupted pack goes on after its finished shards, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import functools
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from packing_checks import (
    children,
    contents,
    identities,
    image,
    image_folder,
    is_alive,
    run_python,
    some_samples,
    start_pack,
    visible,
    wait_until,
)

from oat_dist.data.index import open_split
from oat_dist.data.packing import write_shards, write_splits
from oat_dist.data.packing.samples import Sample, seeded_order
from oat_dist.data.sources import SOURCES
from oat_dist.errors import DataError, OatError

Capture = pytest.CaptureFixture[str]


def test_ctrl_c_then_kill_then_to_the_end(tmp_path: Path) -> None:
    """Three starts of the real command: interrupted, killed with -9, left alone."""
    source = image_folder(tmp_path / "in", 600)
    output, staged = tmp_path / "out", tmp_path / "out" / ".packing-train"
    arguments = ("imagefolder", source, output, "--shard-samples", 4, "--workers", 2)

    def finished() -> dict[str, tuple[int, int]]:
        """The finished shards: those beside which stands what lies where in them."""
        stems = {path.stem for path in staged.glob("*.rows")}
        return {name: found for name, found in identities(staged, "*.tar").items() if Path(name).stem in stems}

    with start_pack(*arguments) as process:
        wait_until(lambda: len(finished()) >= 3 or process.poll() is not None, "the packer did not get under way")
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, errors = process.communicate()
    first = finished()
    assert (process.returncode, len(workers)) == (130, 2) and not any(map(is_alive, workers))
    assert errors == f"note: {len(first)} finished shards kept for the next attempt\ninterrupted\n"
    assert visible(output) == [".packing-train"] and identities(staged, "*.tar") == first

    with start_pack(*arguments) as process:
        wait_until(lambda: len(finished()) >= len(first) + 3 or process.poll() is not None, "the second did not go on")
        workers = children(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL and len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)), "orphans are left")
    second = finished()
    assert first.items() <= second.items() and len(second) < 150
    assert visible(output) == [".packing-train"]

    with start_pack(*arguments) as process:
        text, errors = process.communicate()
    assert process.returncode == 0
    assert errors == f"note: train: going on after {len(second)} finished shard(s), {4 * len(second)} of 600 images\n"
    assert "train: 600 images of 2 classes (300 to 300 each)" in text and " a second\n" in text
    assert visible(output) == ["train"]
    shards = identities(output / "train", "*.tar")
    for name, identity in second.items():  # part-000000012-000000000.tar has become train-000012.tar
        assert shards[f"train-{int(name.split('-')[1]):06d}.tar"] == identity
    plan = SOURCES["imagefolder"](str(source), splits={}, seed=0)
    write_splits(plan.splits, tmp_path / "undisturbed", source=plan.source, shard_samples=4, workers=1)
    assert contents(output / "train") == contents(tmp_path / "undisturbed" / "train")


def broken_pack(samples: list[Sample], output: Path, **options: object) -> dict[str, tuple[int, int]]:
    """Pack with one worker until the last shard, which holds an unreadable image; what is left then."""
    last = seeded_order([f"{i:08d}" for i in range(len(samples))], 0)[-1]
    with pytest.raises(DataError, match="unreadable image"):
        write_shards([*samples[:last], samples[last]._replace(data=b"no"), *samples[last + 1 :]], output, **options)
    found = identities(output.parent / f".packing-{output.name}", "*.tar")
    assert len(found) == 5
    return found


def rewritten(before: dict[str, tuple[int, int]], output: Path) -> int:
    """How many of the shards of before were written anew."""
    after = identities(output, "*.tar")
    return sum(after[f"train-{int(name.split('-')[1]):06d}.tar"] != found for name, found in before.items())


def test_what_failed_is_mended_and_the_rest_kept(tmp_path: Path, capsys: Capture) -> None:
    """A mended image touches its own shard alone; --on-bad skip after a stop repeats nothing either."""
    samples = sorted(some_samples())
    options = {"shard_samples": 5, "workers": 1}
    before = broken_pack(samples, tmp_path / "out" / "train", **options)
    write_shards(samples, tmp_path / "out" / "train", progress=True, **options)
    assert "train: going on after 5 finished shard(s), 25 of 30 images" in capsys.readouterr().err
    assert rewritten(before, tmp_path / "out" / "train") == 0
    write_shards(samples, tmp_path / "whole" / "train", **options)
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "whole" / "train")


def change_seed(samples: list[Sample], options: dict[str, object]) -> None:
    options["seed"] = 1


def change_shard_size(samples: list[Sample], options: dict[str, object]) -> None:
    options["shard_samples"] = 6


def change_recoding(samples: list[Sample], options: dict[str, object]) -> None:
    options["reencode"] = "png"


def change_name(samples: list[Sample], options: dict[str, object]) -> None:
    samples[0] = samples[0]._replace(name="a/0000.jpg")


def change_data(samples: list[Sample], options: dict[str, object]) -> None:
    samples[0] = samples[0]._replace(data=image(seed=77, size=(8, 9)))


def change_label(samples: list[Sample], options: dict[str, object]) -> None:
    samples[0] = samples[0]._replace(label="b")


def remove_sample(samples: list[Sample], options: dict[str, object]) -> None:
    del samples[-1]


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        (change_seed, 5),
        (change_shard_size, 5),
        (change_recoding, 5),
        (change_name, 1),
        (change_data, 1),
        (change_label, 1),
        (remove_sample, 5),
    ],
)
def test_what_no_longer_fits_is_dropped(
    tmp_path: Path, capsys: Capture, change: Callable[[list[Sample], dict[str, object]], None], dropped: int
) -> None:
    samples = sorted(some_samples())
    options: dict[str, object] = {"shard_samples": 5, "workers": 1}
    broken_pack(samples, tmp_path / "out" / "train", **options)
    change(samples, options)
    write_shards(samples, tmp_path / "out" / "train", progress=True, **options)
    expected = (
        f"train: {dropped} shard(s) of an earlier attempt do not fit the present files and options: dropped, packed"
    )
    assert expected in capsys.readouterr().err
    write_shards(samples, tmp_path / "whole" / "train", **options)
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "whole" / "train")


def test_shards_with_images_left_out_are_dropped_when_none_may_be(tmp_path: Path) -> None:
    """Two bad images: first both are skipped until the disk is full, say; then packing is to stop at them."""
    samples = sorted(some_samples())
    order = seeded_order([f"{i:08d}" for i in range(30)], 0)
    samples[order[0]] = samples[order[0]]._replace(data=b"no")
    samples[order[29]] = samples[order[29]]._replace(
        data=lambda: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk"))
    )
    with pytest.raises(DataError, match=r"cannot be read now \(broken disk\); mend that.*; 5 finished shards kept"):
        write_shards(samples, tmp_path / "train", shard_samples=5, workers=1, on_bad="skip")
    with pytest.raises(DataError, match="unreadable image"):
        write_shards(samples, tmp_path / "train", shard_samples=5, workers=1)


def constant(data: bytes, *_: object) -> bytes:
    return data


def test_files_and_callables_are_compared(tmp_path: Path) -> None:
    """A file by size and time, a partial by what is bound to it, a closure by what it holds."""
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(image(seed=i))

    def closure(data: bytes) -> Callable[[], bytes]:
        return lambda: data

    def samples() -> list[Sample]:
        found = [Sample(f"{i:02d}", "ab"[i % 2], tmp_path / f"{i}.jpg") for i in range(10)]
        found += [
            Sample(f"{i:02d}", "ab"[i % 2], functools.partial(constant, image(seed=i), tmp_path / f"{i}.jpg"))
            for i in range(10, 20)
        ]
        return found + [Sample(f"{i:02d}", "ab"[i % 2], closure(image(seed=i))) for i in range(20, 30)]

    order = seeded_order([f"{i:08d}" for i in range(30)], 0)
    options = {"shard_samples": 5, "workers": 1}
    position = {rank: place for place, rank in enumerate(order)}
    for kind, (low, high) in enumerate(((0, 10), (10, 20), (20, 30))):
        output = tmp_path / f"out{kind}" / "train"
        before = broken_pack(samples(), output, **options)
        changed = samples()
        rank = next(rank for rank in range(low, high) if position[rank] < 25)
        if high < 30:
            os.utime(tmp_path / f"{rank}.jpg", ns=(1, 1 + kind))
        else:
            changed[rank] = changed[rank]._replace(data=closure(image(seed=99)))
        write_shards(changed, output, **options)
        assert rewritten(before, output) == 1
    again = tmp_path / "same" / "train"
    before = broken_pack(samples(), again, **options)
    write_shards(samples(), again, **options)
    assert rewritten(before, again) == 0


FULL_DISK = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))  # beyond is as on a full disk
from test_pack_resume import samples_with_a_large_one
from oat_dist.data.packing import write_shards
from oat_dist.errors import DataError
for workers, shard_samples in ((1, 5), (2, 1000)):
    try:
        output = Path(sys.argv[1]) / str(workers) / "train"
        write_shards(samples_with_a_large_one(), output, shard_samples=shard_samples, workers=workers)
    except DataError as error:
        print(error)
"""


def samples_with_a_large_one() -> list[Sample]:
    """200 samples; the last one in the packing order takes a tar of more than 40,000 bytes."""
    samples = sorted(some_samples(200))
    last = seeded_order([f"{i:08d}" for i in range(len(samples))], 0)[-1]
    samples[last] = samples[last]._replace(data=image("BMP", size=(200, 100)))
    return samples


def test_full_disk_is_a_clear_error_and_packing_goes_on_later(tmp_path: Path) -> None:
    text = run_python(FULL_DISK, tmp_path, 40_000)
    kept, nothing = text.splitlines()
    assert kept == (
        f"{tmp_path / '1'}: no room left on the disk (File too large); 39 finished shards kept for the next attempt, "
        "free some space and give the same command again"
    )
    assert nothing == (
        f"{tmp_path / '2'}: no room left on the disk (File too large); nothing was packed, "
        "free some space or choose another folder"
    )
    assert visible(tmp_path / "2") == [] and visible(tmp_path / "1") == [".packing-train"]
    before = identities(tmp_path / "1" / ".packing-train", "*.tar")
    write_shards(samples_with_a_large_one(), tmp_path / "1" / "train", shard_samples=5)
    assert len(before) == 39 and rewritten(before, tmp_path / "1" / "train") == 0
    assert visible(tmp_path / "1") == ["train"]


def killed_before_rename(number: int, output: Path) -> None:
    """Pack two splits in a child that dies by SIGKILL when it is about to rename something for the n-th time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
        process = os.fork()
    if process == 0:
        try:
            rename, count = Path.rename, iter(range(1, 100))

            def counted(path: Path, target: Path) -> Path:
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(path, target)

            Path.rename = counted
            write_splits({"train": some_samples(8), "val": some_samples(4)}, output, shard_samples=4, workers=1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_kill_while_the_splits_get_their_names_is_mended(tmp_path: Path) -> None:
    """Once everything is written the next packer completes what is left to rename: whole splits, both of them."""
    write_splits({"train": some_samples(8), "val": some_samples(4)}, tmp_path / "whole", shard_samples=4)
    for number in range(1, 6):  # two shards of train, train, the shard of val, val
        output = tmp_path / str(number)
        killed_before_rename(number, output)
        assert visible(output) != ["train", "val"]
        with pytest.raises(DataError, match="train: already exists"):
            write_splits({"train": some_samples(8)}, output)
        assert visible(output) == ["train", "val"]
        assert contents(output / "train") == contents(tmp_path / "whole" / "train")
        assert contents(output / "val") == contents(tmp_path / "whole" / "val")


def test_kill_between_the_two_renames_of_an_overwrite_is_mended(tmp_path: Path) -> None:
    write_shards(some_samples(), tmp_path / "train")
    (tmp_path / "train").rename(tmp_path / ".replaced-train")
    with pytest.raises(DataError, match="already exists"):
        write_shards(some_samples(6), tmp_path / "train")
    assert len(open_split(tmp_path / "train")) == 30 and visible(tmp_path) == ["train"]


def test_second_packer_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """From inside the first: its lock is held while it reads its samples."""

    def pack_meanwhile() -> bytes:
        for split in ("train", "val"):
            with pytest.raises(OatError, match="out: another process is packing into this folder; wait for it"):
                write_shards(some_samples(), tmp_path / "out" / split, overwrite=True)
        return image()

    write_shards([("x", 0, pack_meanwhile)], tmp_path / "out" / "train")
    assert visible(tmp_path / "out") == ["train"]


def test_unfinished_pack_of_another_split_is_named_and_left(tmp_path: Path, capsys: Capture) -> None:
    samples = sorted(some_samples())
    before = broken_pack(samples, tmp_path / "train", shard_samples=5, workers=1)
    write_shards(samples, tmp_path / "val", progress=True)
    expected = (
        f"note: {tmp_path / '.packing-train'}: left by an interrupted pack of another split; give its command again"
    )
    assert expected in capsys.readouterr().err
    assert identities(tmp_path / ".packing-train", "*.tar") == before
