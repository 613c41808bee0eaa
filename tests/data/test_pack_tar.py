"""The tars: byte for byte what webdataset's and Python's own writers make, and readable by everyone."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from packing_checks import image, some_samples

from oat_dist.data.packing import write_shards
from oat_dist.data.packing.samples import Sample
from oat_dist.data.packing.tarwriter import SampleTar, tar_capacity, tar_record_size, tar_size
from oat_dist.errors import DataError
from oat_dist.files import sha256_file

# A bmp sorts before the label's "cls"; contents of 0, 511, 512 and 513 bytes, and one that needs many digits.
MEMBERS = [
    ("00000000", "jpg", b"", 0),
    ("00000001", "bmp", b"\xff" * 511, 7),
    ("00000002", "png", b"\x00" * 512, 21840),
    ("00000003", "webp", b"abc" * 171, 3),
    ("000000004", "tif", bytes(range(256)) * 5000, 2_000_000_000),
]


def test_bytes_are_those_of_webdataset_and_tarfile(tmp_path: Path) -> None:
    tar = SampleTar(tmp_path / "ours.tar")
    offsets = [tar.add(*member) for member in MEMBERS]
    content = tar.size
    assert content == sum(tar_record_size(len(data)) for _, _, data, _ in MEMBERS)
    finished = tar.finish()

    theirs, plain = io.BytesIO(), io.BytesIO()
    writer = webdataset.TarWriter(theirs, mtime=0, encoder=False)
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, kind, data, label in MEMBERS:
            text = str(label).encode()
            writer.write({"__key__": key, kind: data, "cls": text})
            for name, part in sorted([(f"{key}.{kind}", data), (f"{key}.cls", text)]):
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.uname, info.gname = len(part), 0o444, "bigdata", "bigdata"
                archive.addfile(info, io.BytesIO(part))
    writer.close()
    ours = (tmp_path / "ours.tar").read_bytes()
    assert ours == theirs.getvalue() == plain.getvalue()
    assert finished == (len(ours), sha256_file(tmp_path / "ours.tar"))
    assert len(ours) == tar_size(content)
    for (_, _, data, _), offset in zip(MEMBERS, offsets, strict=True):
        assert ours[offset : offset + len(data)] == data


def test_the_program_tar_lists_them(tmp_path: Path) -> None:
    write_shards(some_samples(6), tmp_path / "train")
    listed = subprocess.run(
        ["tar", "tvf", str(tmp_path / "train" / "train-000000.tar")], capture_output=True, text=True, check=True
    )
    assert listed.stderr == "" and len(listed.stdout.splitlines()) == 12
    assert all(line.startswith("-r--r--r-- bigdata/bigdata") for line in listed.stdout.splitlines())


def test_sizes_of_tars() -> None:
    """10,240 bytes are the least; a tar of its full capacity has just its size."""
    assert tar_size(0) == tar_size(10_240 - 1024) == 10_240 and tar_size(10_240 - 1023) == 20_480
    for size in (10_240, 30_720, 256 << 20):
        assert size - 10_240 < tar_size(tar_capacity(size)) <= size < tar_size(tar_capacity(size) + 1)
    assert [tar_record_size(size) for size in (0, 1, 512, 513)] == [1536, 2048, 2048, 2560]


def test_a_disk_that_gives_other_bytes_back_is_noticed(tmp_path: Path) -> None:
    """The file is changed behind the writer's back, once a byte of it and once its length."""
    for damage in (b"x", bytes(20_000)):
        tar = SampleTar(tmp_path / "a.tar")
        tar.add("00000000", "jpg", bytes(2 << 20), 1)  # larger than the buffer, so that it lies on disk
        with (tmp_path / "a.tar").open("r+b") as file:
            file.seek(600 if len(damage) == 1 else 3 << 20)
            file.write(damage)
        with pytest.raises(DataError, match=r"a\.tar: reads back otherwise than it was written; check the disk"):
            tar.finish()


def test_shards_of_callables_keep_to_their_size_too(tmp_path: Path) -> None:
    """Their bytes are not known ahead: a job of several shards' worth is cut while it is written."""
    data = [image("BMP", seed=i, size=(40, 30 + i)) for i in range(24)]
    samples = [Sample(f"{i:03d}", i % 2, lambda i=i: data[i]) for i in range(24)]
    sets = [
        write_shards(samples, tmp_path / str(workers) / "train", shard_bytes=30_720, shard_samples=20, workers=workers)
        for workers in (1, 2)
    ]
    assert sets[0].digest == sets[1].digest
    shards = sets[0].manifest.shards
    assert max(shard.size for shard in shards) <= 30_720 and len(shards) > 4
    assert [shard.name for shard in shards] == [f"train-{i:06d}.tar" for i in range(len(shards))]
    assert {path.name for path in (tmp_path / "1" / "train").glob("*.tar")} == {shard.name for shard in shards}
    for i in range(24):
        shard = tmp_path / "1" / "train" / shards[sets[0].index.shard[i]].name
        start, length = int(sets[0].index.offset[i]), int(sets[0].index.length[i])
        assert shard.read_bytes()[start : start + length] == data[i]
