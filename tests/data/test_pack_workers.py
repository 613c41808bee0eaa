"""Packing in several processes: the same bytes as in one, nothing pickled, no orphans, every death explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packing_checks import contents, image_folder, run_python, start_pack

from oat_dist.commands import pack
from oat_dist.data.packing import write_shards

# Every line it prints is a fact that the tests below look up.
PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
import oat_dist.commands.pack
from packing_checks import children, image, is_alive
from oat_dist.data.packing import write_shards
from oat_dist.data.workers import can_fork
from oat_dist.errors import DataError

def fact(name, value):
    print(json.dumps([name, value]))

folder = Path(sys.argv[1])
fact("torch is loaded", "torch" in sys.modules)
fact("can fork", can_fork())

lock = threading.Lock()  # cannot be pickled, nor can the lambdas that hold it
seen = folder / "seen"
seen.mkdir()
def data(i):
    with lock:
        (seen / str(os.getpid())).touch()
        time.sleep(0.001)
        return image(seed=i % 7)
samples = [(f"{i:04d}", i % 2, lambda i=i: data(i)) for i in range(200)]
write_shards(samples, folder / "forked" / "train", shard_samples=20, workers=2)
fact("processes", len(os.listdir(seen)) - (str(os.getpid()) in os.listdir(seen)))
fact("children left", children(os.getpid()))

def refused(name, bad, **options):
    samples = [(f"{i:04d}", i % 2, bad if i == 100 else lambda i=i: image(seed=i % 7)) for i in range(200)]
    started = time.monotonic()
    try:
        write_shards(samples, folder / name / "train", shard_samples=20, workers=2, **options)
    except (DataError, RuntimeError) as error:
        fact(name, [type(error).__name__, str(error)])
    fact(name + ", children left", children(os.getpid()))

refused("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
refused("exits", lambda: os._exit(3))
refused("defect", lambda: [][1])
refused("memory", lambda: bytes(1 << 62))
refused("unreadable", lambda: b"no")
refused("disk", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")), on_bad="skip")

event = threading.Event()
thread = threading.Thread(target=event.wait)
thread.start()
fact("can fork with a thread", can_fork())
write_shards(samples, folder / "threads" / "train", shard_samples=20, workers=2)
event.set()
thread.join()
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("workers")
    return folder, dict(json.loads(line) for line in run_python(PROGRAM, folder).splitlines())


def test_the_command_forks(facts: tuple[Path, dict[str, object]]) -> None:
    """Nothing it imports loads torch or starts a thread, so it may; with a thread of Python it may not."""
    _, found = facts
    assert found["can fork"] is True and found["torch is loaded"] is False
    assert found["can fork with a thread"] is False
    assert found["processes"] == 2 and found["children left"] == []


def test_processes_and_threads_write_the_same(facts: tuple[Path, dict[str, object]]) -> None:
    folder, _ = facts
    assert len(list((folder / "forked" / "train").glob("*.tar"))) == 10
    assert contents(folder / "forked" / "train") == contents(folder / "threads" / "train")


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        (
            "killed",
            "DataError",
            "a worker process was killed by signal 9 (Killed); if memory ran out, use fewer work",
        ),
        ("exits", "DataError", "a worker process ended with status 3; if memory ran out, use fewer workers"),
        ("memory", "DataError", "memory ran out in a worker process; use fewer workers"),
        (
            "unreadable",
            "DataError",
            "split 'train', sample '0100': unreadable image (not an image of a known kind); mend",
        ),
        (
            "disk",
            "DataError",
            "split 'train', sample '0100': cannot be read now (Input/output error); mend that and start",
        ),
        ("defect", "RuntimeError", "a worker process failed:\nTraceback (most recent call last):"),
    ],
)
def test_errors_of_workers_are_told(facts: tuple[Path, dict[str, object]], name: str, kind: str, text: str) -> None:
    _, found = facts
    error = found[name]
    assert isinstance(error, list) and error[0] == kind
    assert str(error[1]).startswith(text)
    assert ("IndexError: list index out of range" in error[1]) == (name == "defect")
    assert found[f"{name}, children left"] == []


def test_the_command_says_what_went_wrong_in_a_worker_in_one_line(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 150)
    (source / "a" / "0100.jpg").write_bytes(b"<html>")
    with start_pack("imagefolder", source, tmp_path / "out", "--workers", 2, "--shard-samples", 150) as process:
        text, errors = process.communicate()
    assert (process.returncode, text) == (2, "")
    assert errors == (
        f"error: {source / 'a' / '0100.jpg'}: unreadable image (not an image of a known kind); mend or remove it, "
        'or leave such images out and list them with --on-bad skip (on_bad="skip")\n'
    )


def test_any_number_of_workers_writes_the_same(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 260)
    samples = [(path.name, path.parent.name, path) for path in source.glob("*/*.jpg")]
    for workers in (1, 2, 5):
        write_shards(samples, tmp_path / str(workers) / "train", shard_samples=90, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


# The command.


def test_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = image_folder(tmp_path / "in", 30)
    arguments = ["imagefolder", str(source), str(tmp_path / "out"), "--split", "train=0.8,val=0.2"]
    assert pack.main([*arguments, "--shard-samples", "10", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "2 classes",
        "               train       val",
        "a                 12         3",
        "b                 12         3",
        "all images        24         6",
        "shards             3         1",
        "bytes       80.0 KiB  20.0 KiB",
        f"dry run: nothing was written to {tmp_path / 'out'}",
    ]
    assert not (tmp_path / "out").exists()
    assert pack.main([*arguments, "--shard-samples", "10"]) == 0
    sizes = {
        split: sum(p.stat().st_size for p in (tmp_path / "out" / split).glob("*.tar")) for split in ("train", "val")
    }
    assert sizes == {"train": 80 << 10, "val": 20 << 10}  # just what was announced


def test_options_of_the_command_reach_the_packer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = image_folder(tmp_path / "in", 12)
    arguments = ["imagefolder", str(source), str(tmp_path / "out"), "--short-side", "5", "--reencode", "webp:80"]
    assert pack.main([*arguments, "--shard-samples", "4", "--dry-run"]) == 0
    assert "note: shards and bytes are those of the files as they are now" in capsys.readouterr().out
    assert pack.main([*arguments, "--shard-samples", "4", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "in 3 shards, all 8x5" in text and "12 images in " in text
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["source"] == "imagefolder; short side at most 5 (Lanczos), written as webp:80"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--reencode", "bmp"], "error: reencode is 'bmp'; write jpeg, jpeg:QUALITY, png, webp or webp:QUALITY\n"),
        (["--list", "2"], "error: --list belongs to the source ucf101, not to imagefolder; leave it out\n"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    source = image_folder(tmp_path / "in", 4)
    assert pack.main(["imagefolder", str(source), str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err == message and not (tmp_path / "out").exists()
