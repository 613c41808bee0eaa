"""The reader of tars: the members that tarfile finds, at the same places, in every form; and every kind of damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from foreign_tars import picture, write_tar

from oat_dist.data.foreign.write_index import index_shards
from oat_dist.data.storage import ShardReader
from oat_dist.data.tars.tarstream import TarStream
from oat_dist.errors import DataError

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members(data: bytes, *, most: int = 1 << 30) -> list[tuple[str, int, bytes]]:
    """(name, offset, content) of all files, out of a stream that gives at most `most` bytes at a time."""
    file = io.BytesIO(data)
    stream = TarStream(lambda size: file.read(min(size, most)))
    found = [(name, offset, stream.content()) for name, offset, size in stream]
    assert (stream.size, stream.digest()) == (len(data), hashlib.sha256(data).hexdigest())
    return found


def with_tarfile(data: bytes) -> list[tuple[str, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(m.name, m.offset_data, data[m.offset_data :][: m.size]) for m in tar if m.isreg()]


def make(form: str, seed: int = 0) -> bytes:
    """Files with names of all lengths, empty and large ones, links, folders and times that are no whole seconds."""
    rng = random.Random(seed)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMS[form]) as tar:
        for i in range(40):
            longest = 90 if form == "ustar" else 400
            name = "/".join("ab.é x"[rng.randrange(6)] * rng.randint(1, 40) for _ in range(rng.randint(1, 9)))[:longest]
            info = tarfile.TarInfo(f"{i}-{name}")
            info.mtime = i + (0.25 if form == "pax" else 0)
            kind = rng.randrange(8)
            if kind == 0:
                info.type, info.linkname = tarfile.SYMTYPE, "x" * rng.randint(1, 90 if form == "ustar" else 300)
            elif kind == 1:
                info.type = tarfile.DIRTYPE
            data = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 5000))) if kind > 1 else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("most", [1 << 30, 700])
def test_the_members_that_tarfile_finds(form: str, most: int) -> None:
    data = make(form)
    expected = with_tarfile(data)
    assert len(expected) > 20 and members(data, most=most) == expected
    if form != "ustar":
        assert max(len(name) for name, _, _ in expected) > 200


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    (tmp_path / "in" / ("d" * 120)).mkdir(parents=True)
    for name in ("a.jpg", "a.cls", f"{'d' * 120}/b.jpg", "é.png"):
        (tmp_path / "in" / name).write_bytes(name.encode() * 50)
    for form in ("gnu", "posix", "ustar", "v7", "oldgnu"):
        names = ["."] if form in ("gnu", "posix", "oldgnu") else ["a.jpg", "a.cls", "é.png"]
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "--sort=name", f"--format={form}", "-cf", path, *names], cwd=tmp_path / "in", check=True)
        assert members(path.read_bytes()) == with_tarfile(path.read_bytes())
        assert len(members(path.read_bytes())) == (4 if names == ["."] else 3)


def test_prefix_of_ustar_and_sizes_in_base_256() -> None:
    name = f"{'folder/' * 20}file.jpg"
    info = tarfile.TarInfo(name)
    info.size = 3
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert header[345] != 0
    data = header + b"abc".ljust(512, b"\0") + bytes(10240)
    assert members(data) == [(name, 512, b"abc")] == with_tarfile(data)
    large = bytearray(header)
    large[124:136] = b"\x80" + (3).to_bytes(11, "big")
    large[148:156] = b"%06o\0 " % (sum(large) - sum(large[148:156]) + 8 * 32)
    assert members(bytes(large) + data[512:]) == [(name, 512, b"abc")] == with_tarfile(bytes(large) + data[512:])


def damage(data: bytes) -> str:
    with pytest.raises(DataError) as error:
        members(data)
    return str(error.value)


def test_every_place_to_cut_a_tar() -> None:
    data = make("pax", 1)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    whole = last.offset_data + -(-last.size // 512) * 512
    assert members(data[: whole + 512])  # one empty block is end enough
    for size in [*range(512, whole, 997), whole - 1, whole, whole + 511]:
        assert (
            damage(data[:size]) == f"cut short: ends after {size:,} bytes without the end marker of a tar; restore it"
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_in_a_header(form: str) -> None:
    data = make(form, 2)
    offset = with_tarfile(data)[5][1] - 512
    for place in (0, 110, 130, 150, 156, 200, 340, 511):
        flipped = bytearray(data)
        flipped[offset + place] ^= 4
        assert damage(bytes(flipped)) == f"damaged header at byte {offset:,}; restore the tar"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty; restore the tar"),
        (b"<html>" + b"x" * 600, "not a tar"),
        (
            gzip.compress(bytes(9999), 0),
            "compressed with gzip: samples cannot be read in place; unpack it to a plain",
        ),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd: samples cannot be read in place"),
        (make("gnu") * 2, "goes on after the end marker of a tar, where no reader looks (tars joined with cat?)"),
    ],
)
def test_files_that_are_no_tar(data: bytes, text: str) -> None:
    assert damage(data).startswith(text)


def test_sparse_members(tmp_path: Path) -> None:
    with (tmp_path / "s.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, "s.jpg"], cwd=tmp_path, check=True)
        text = damage(path.read_bytes())
        assert "s.jpg is stored sparse; write the tar anew, without --sparse" in text


@pytest.mark.parametrize("record", [b"8 path=x\n", b"99999 path=x\n", b"x path=a\n", b"10 pathxxx\n", b"11 size=-1\n"])
def test_damaged_pax_records(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    last = tarfile.TarInfo("a.jpg")
    data = info.tobuf() + record.ljust(512, b"\0") + last.tobuf() + bytes(10240)
    assert damage(data).startswith("damaged header at byte ")


def test_samples_that_webdataset_would_refuse(tmp_path: Path) -> None:
    image = picture(0)
    twice = write_tar(tmp_path / "0.tar", [("a.jpg", image), ("a.cls", b"0"), ("a.JPG", image)])
    with pytest.raises(DataError, match=r"0.tar: member a.JPG comes twice; write the tar anew with different keys"):
        index_shards([twice], tmp_path / "out")
    apart = write_tar(tmp_path / "1.tar", [("a.jpg", image), ("b.jpg", image), ("a.cls", b"0"), ("b.cls", b"0")])
    with pytest.raises(DataError, match=r"1.tar: the members of sample a do not follow one another; .*--sort=name"):
        index_shards([apart], tmp_path / "out")


def test_names_are_no_paths_and_odd_members_do_no_harm(tmp_path: Path) -> None:
    images = [picture(i) for i in range(5)]
    keys = ["../../../up", "/etc/abs", "dir.v1/key", "line\nbreak", "ünï"]
    file = [m for key, image in zip(keys, images, strict=True) for m in ((f"{key}.jpg", image), (f"{key}.cls", b"0"))]
    odd = [(name, b"x") for name in ("__meta__", "__info__/a.jpg", "no-extension", ".hidden.jpg", "d/._mac.jpg")]
    tar = write_tar(tmp_path / "in/t.tar", [*odd[:2], *file, *odd[2:]])
    before = sorted(tmp_path.rglob("*"))
    indexed = index_shards([tar], tmp_path / "in/out")
    shards = indexed.shards
    assert [shards.index.name(i) for i in range(5)] == [
        "t/../../../up",
        "t//etc/abs",
        "t/dir.v1/key",
        "t/line\\nbreak",
        "t/ünï",
    ]
    assert indexed.others == {"": 5}
    reader = ShardReader(shards)
    assert [reader.read(i) for i in range(5)] == images
    reader.close()
    assert sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts) == before
