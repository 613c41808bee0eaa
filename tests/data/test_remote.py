"""Splits behind URLs, from a real HTTP server: what is fetched, how often, and every way in which it can fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_server import (
    Behaviour,
    Handler,
    ShardServer,
    altered,
    cut,
    good,
    hang_up,
    in_turn,
    long,
    short,
    slow,
    status,
    write_split,
)

from oat_dist.data import storage
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.remote import fetch as remote
from oat_dist.data.remote.fetch import is_url, join_location, local_path, shown, shown_text
from oat_dist.data.remote.shard_cache import RemoteFile
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

FIRST = "train-000000.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """The folder above a split `train`, and its samples. Read only."""
    folder = tmp_path_factory.mktemp("served")
    return folder, write_split(folder / "train")


@pytest.fixture
def server(packed: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ShardServer(packed[0]) as server:
        yield server


def first_sample(shards: ShardSet) -> int:
    """A sample in shard 0."""
    return int(np.flatnonzero(shards.index.shard == 0)[0])


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("shards/*.part"))


def rewrite_manifest(folder: Path, url: str) -> None:
    """Say that the first shard lies at `url`."""
    values = json.loads((folder / "manifest.json").read_text())
    values["shards"][0]["url"] = url
    (folder / "manifest.json").write_text(json.dumps(values))


# What works.


def test_a_split_behind_a_url_is_the_split(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    local = open_split(packed[0] / "train")
    shards = open_split(f"{server.url}/train/", cache_dir=tmp_path)
    assert shards.digest == local.digest and len(shards) == 24 and shards.where == f"{server.url}/train/"
    assert set(server.requests) == {"manifest.json", "index.safetensors"}
    reader = ShardReader(shards)
    assert [reader.read(i) for i in range(24)] == packed[1]
    assert shards.describe(0) == f"'0000.jpg' (sample 0, in {server.url}/train/train-{shards.index.shard[0]:06d}.tar)"
    reader.close()
    assert [reader.read(i) for i in range(24)] == packed[1]  # closed readers open again
    assert set(server.requests.values()) == {1} and len(server.requests) == 6  # all out of the cache
    assert parts(tmp_path) == []
    assert open_split(f"{server.url}/train", cache_dir=tmp_path).digest == local.digest
    assert server.requests["index.safetensors"] == 1 and server.requests["manifest.json"] == 2


def test_many_threads_fetch_each_shard_once(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    for number in range(4):
        server.behaviours[f"train-{number:06d}.tar"] = slow(0.1)
    reader = ShardReader(open_split(f"{server.url}/train", cache_dir=tmp_path))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, range(24))) == packed[1]
    assert set(server.requests.values()) == {1}


def test_announced_shards_come_before_they_are_read_a_few_at_a_time(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FETCHERS", 2)
    active, most, lock = [0], [0], threading.Lock()

    def watched(handler: Handler, data: bytes) -> bool:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.05)
        with lock:
            active[0] -= 1
        return good(handler, data)

    for number in range(4):
        server.behaviours[f"train-{number:06d}.tar"] = watched
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    reader = ShardReader(shards)
    order = np.argsort(shards.index.shard, kind="stable")[::-1]  # the last shard first
    for _ in range(3):  # said again and again, fetched once
        reader.prefetch(order)
    until = time.monotonic() + 20
    while not all(shards.cache.holds(file) for file in shards.remote_shards()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert most[0] == 2 and [server.requests[f"train-{k:06d}.tar"] for k in range(4)] == [1, 1, 1, 1]
    reader.prefetch(order)
    assert [reader.read(i) for i in range(24)] == packed[1]
    reader.close()
    assert sum(server.requests.values()) == 6


def test_nothing_is_announced_of_local_shards(packed: tuple[Path, list[bytes]]) -> None:
    before = threading.active_count()
    reader = ShardReader(open_split(packed[0] / "train"))
    reader.prefetch(np.arange(24))
    assert threading.active_count() == before
    reader.close()


def test_shards_may_lie_elsewhere(server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    """A local manifest of a remote shard, of one in another folder, and of one given as file:// URL."""
    served = packed[0] / "train"
    for name, url, requests in (
        ("http", f"{server.url}/train/{FIRST}", 1),
        ("relative", "../elsewhere.tar", 0),
        ("file", f"file://{served / FIRST}", 0),
        ("absolute", str(served / FIRST), 0),
    ):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        for file in served.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / FIRST).rename(tmp_path / name / "elsewhere.tar")
        with pytest.raises(DataError, match="the shard is missing"):
            open_split(folder)
        rewrite_manifest(folder, url)
        reader = ShardReader(open_split(folder, cache_dir=tmp_path / "cache" / name))
        assert [reader.read(i) for i in range(24)] == packed[1]
        reader.close()
        assert server.requests[FIRST] == requests
        server.requests.clear()
    split = open_split(f"file://{served}")
    assert split.folder == served and split.remote_shards() == []


def test_other_protocols_go_the_same_way(packed: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in (packed[0] / "train").iterdir():
        memory.pipe_file(f"/bucket/train/{file.name}", file.read_bytes())
    reader = ShardReader(open_split("memory://bucket/train", cache_dir=tmp_path))
    assert [reader.read(i) for i in range(24)] == packed[1]
    memory.rm("/bucket", recursive=True)
    with pytest.raises(DataError, match="memory://bucket/train: no packed split there"):
        open_split("memory://bucket/train", cache_dir=tmp_path)


def test_a_shard_without_checksum_is_known_by_its_size(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for file in (packed[0] / "train").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rewrite_manifest(folder, f"{server.url}/train/{FIRST}")
    values = json.loads((folder / "manifest.json").read_text())
    values["shards"][0]["sha256"] = ""
    (folder / "manifest.json").write_text(json.dumps(values))
    server.behaviours[FIRST] = in_turn(short, altered)
    shards = open_split(folder, cache_dir=tmp_path / "cache")
    assert len(ShardReader(shards).read(first_sample(shards))) == 3000
    assert server.requests[FIRST] == 2


# What fails, and is tried again.


@pytest.mark.parametrize(
    ("behaviours", "requests"),
    [
        ((status(503), status(503), good), 3),
        ((status(429), cut, good), 3),
        ((cut, short, cut, good), 4),
        ((altered, good), 2),
    ],
)
def test_what_passes_is_tried_again(
    server: ShardServer,
    packed: tuple[Path, list[bytes]],
    tmp_path: Path,
    behaviours: tuple[Behaviour, ...],
    requests: int,
) -> None:
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    server.behaviours[FIRST] = in_turn(*behaviours)
    sample = first_sample(shards)
    assert ShardReader(shards).read(sample) == packed[1][sample]
    assert server.requests[FIRST] == requests and parts(tmp_path) == []


@pytest.mark.parametrize(
    ("behaviour", "message", "requests"),
    [
        (cut, "cannot be fetched in 6 tries: ClientPayloadError: the connection was cut in the middle of the file", 6),
        (short, r"in 6 tries: it ended after [\d,]+ of [\d,]+ bytes; make sure that file and manifest belong", 6),
        (hang_up, "in 6 tries: ServerDisconnectedError: the server hung up; check the URL, the network", None),
        (status(503), "in 6 tries: HTTP 503 Service Unavailable; check the URL, the network and the server", 6),
        (altered, "in 2 tries: its SHA-256 is not that of the manifest", 2),
        (long, r"cannot be fetched: it is longer than the [\d,]+ bytes of the manifest", 1),
        (status(403), "cannot be fetched: HTTP 403 Forbidden; give it the credentials", 1),
        (status(404), "it is not there; check the URL, or restore the file", 1),
        (status(410), "cannot be fetched: HTTP 410 Gone", 1),
    ],
)
def test_what_lasts_is_an_error_and_leaves_nothing(
    server: ShardServer, tmp_path: Path, behaviour: Behaviour, message: str, requests: int | None
) -> None:
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    server.behaviours[FIRST] = behaviour
    with pytest.raises(DataError, match=message) as error:
        ShardReader(shards).read(first_sample(shards))
    assert str(error.value).startswith(f"{server.url}/train/{FIRST}: ") and "\n" not in str(error.value)
    assert requests is None or server.requests[FIRST] == requests
    assert parts(tmp_path) == [] and not shards.cache.holds(shards.remote_shards()[0])


def test_a_split_that_is_not_there(server: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{server.url}/test: no packed split there, manifest.json is missing; check"):
        open_split(f"{server.url}/test", cache_dir=tmp_path)
    server.behaviours["index.safetensors"] = altered
    with pytest.raises(DataError, match=f"^{server.url}/train/index.safetensors: cannot .*SHA-256 is not that of the"):
        open_split(f"{server.url}/train", cache_dir=tmp_path)
    server.behaviours["manifest.json"] = lambda handler, data: good(handler, b"<html>")
    with pytest.raises(DataError, match=f"^{server.url}/train/manifest.json: damaged manifest"):
        open_split(f"{server.url}/train", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/train", "cannot be fetched in 6 tries: .*Cannot connect to host 127.0.0.1:1"),
        ("abfs://bucket/train", "reading abfs:// needs a package that is not installed: Install adlfs"),
        ("nope://bucket/train", "Protocol not known: nope; give a path, or a URL that fsspec knows"),
        ("http://:80/train", "cannot be fetched: ValueError: Invalid URL: host is required"),
    ],
)
def test_a_url_of_no_use(server: ShardServer, tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_split(url, cache_dir=tmp_path)
    assert str(error.value).startswith(f"{url}/manifest.json: ") and "\n" not in str(error.value)


def test_a_remote_manifest_may_not_name_local_files(tmp_path: Path, server: ShardServer) -> None:
    write_split(tmp_path / "train")
    local = "lies in a local folder ({}), which the manifest of a remote split may not name"
    other_protocol = (
        "lies at {}: the manifest of this remote split may name only URLs of http, https, s3, s3a, gs, gcs;"
    )
    chained = "is said to lie at {}: '::' is not allowed there"
    with ShardServer(tmp_path) as other:
        for target, why in (
            ("/etc/hostname", local),
            ("file:///etc/hostname", local),
            ("FILE:///etc/hostname", local),
            ("local:///etc/hostname", local),
            ("Local://etc/hostname", local),
            ("memory://bucket/x.tar", other_protocol),
            ("sftp://host/x.tar", other_protocol),
            ("s3://bucket/x::file:///etc/hostname", chained),
        ):
            rewrite_manifest(tmp_path / "train", target)
            with pytest.raises(DataError) as error:
                open_split(f"{other.url}/train", cache_dir=tmp_path / "cache")
            assert why.format(target) in str(error.value), target
        for target in ("s3://bucket/x.tar", "gs://bucket/x.tar", "https://host/x.tar"):
            rewrite_manifest(tmp_path / "train", target)
            assert open_split(f"{other.url}/train", cache_dir=tmp_path / "cache").remote_shards()[0].url == target


def test_a_further_try_is_announced_by_the_first_process(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    location = f"{server.url.replace('://', '://anna:geheim@')}/train"
    for rank, expected in (
        ("0", [f"503 Service Unavailable; trying again ({number} of 6)" for number in (2, 3)]),
        ("1", []),
    ):
        monkeypatch.setenv("RANK", rank)
        shards = open_split(location, cache_dir=tmp_path / rank)
        assert capsys.readouterr().err == ""
        server.behaviours[FIRST] = in_turn(status(503), status(503), good)
        ShardReader(shards).read(first_sample(shards))
        said = capsys.readouterr()
        assert said.err.splitlines() == [f"note: {server.url}/train/{FIRST}: HTTP {text}" for text in expected]
        assert said.out == ""


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_fetching_ahead_outlives_any_error(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    ahead = storage._Ahead(shards)
    files = shards.remote_shards()
    ahead.announce([RemoteFile(files[0].url, 2**70, "a" * 64)] * storage.FETCHERS)  # OverflowError, no DataError
    until = time.monotonic() + 60
    while ahead._busy or ahead._waiting:
        assert time.monotonic() < until
        time.sleep(0.01)
    ahead.announce(files)  # once is enough: they do not get in each other's way
    while not all(shards.cache.holds(file) for file in files):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert all(thread.is_alive() for thread in ahead._threads)
    ahead.stop()
    assert not any(thread.is_alive() for thread in ahead._threads)
    ahead._stop.clear()
    ahead.announce([RemoteFile(files[0].url, files[0].size, "")])  # dead threads do not count
    while not shards.cache.holds(RemoteFile(files[0].url, files[0].size, "")):
        assert time.monotonic() < until
        time.sleep(0.01)
    ahead.stop()


def test_no_secret_is_printed(server: ShardServer, tmp_path: Path) -> None:
    location = f"{server.url.replace('://', '://anna:geheim@')}/train?token=s3cr3t"
    shards = open_split(location, cache_dir=tmp_path)
    assert set(server.agents) == {"Basic YW5uYTpnZWhlaW0="}
    texts = [shards.where, shards.describe(0)]
    server.behaviours["manifest.json"] = status(403)
    for behaviour in (cut, hang_up, status(500), status(403), status(404), long):
        server.behaviours[FIRST] = behaviour
        with pytest.raises(DataError) as error:
            ShardReader(shards).read(first_sample(shards))
        texts.append(str(error.value))
        assert error.value.__cause__ is None and error.value.__suppress_context__  # nor in a traceback
    for url in (location, location.replace(str(server.server_port), "1"), location.replace("/train", "/none")):
        with pytest.raises(DataError) as error:
            open_split(url, cache_dir=tmp_path)
        texts.append(str(error.value))
    for text in texts:
        assert "127.0.0.1" in text and not any(secret in text for secret in ("anna", "geheim", "s3cr3t", "token"))


def test_readers_that_wait_can_be_let_go(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tries again after a minute, one waits for it: neither holds up the end of a run."""
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 60.0)
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    server.behaviours[FIRST] = status(503)
    reader = ShardReader(shards)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(reader.read, first_sample(shards)) for _ in range(2)]
        while not server.requests[FIRST]:
            time.sleep(0.01)
        time.sleep(0.1)
        reader.cancel_reads()
        for read in reads:
            with pytest.raises(DataError, match=f"{FIRST}: no longer waited for, since the run ends"):
                read.result(timeout=10)
    assert parts(tmp_path) == []
    server.behaviours.clear()
    assert len(reader.read(first_sample(shards))) == 3000


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("http://host/packed/train", "a b.tar", "http://host/packed/train/a%20b.tar"),
        ("http://host/packed//train/", "x.tar", "http://host/packed/train/x.tar"),
        ("https://host/packed?sig=a/b", "x.tar", "https://host/packed/x.tar?sig=a/b"),
        ("https://host", "x.tar", "https://host/x.tar"),
        ("s3://bucket/a", "b ?.tar", "s3://bucket/a/b ?.tar"),
        ("s3://bucket/a", "../../../x.tar", "s3://bucket/x.tar"),
        ("gs://bucket", "x.tar", "gs://bucket/x.tar"),
    ],
)
def test_locations_are_joined(folder: str, name: str, joined: str) -> None:
    assert join_location(folder, name) == joined


def test_what_is_a_url_and_how_it_is_shown() -> None:
    assert [is_url(x) for x in ("s3://b/x", "http://h", "file:///x", "/a://b", "a/b", Path("/x"))] == [
        *(True, True, False, False, False, False)
    ]
    for url in ("FILE:///x/y", "local:///x/y", "LOCAL:///x/y", "file:///x/y", "/x/y"):
        assert not is_url(url) and local_path(url) == "/x/y"
    for url, text in (
        ("http://u:p@ss@host/x", "http://host/x"),
        ("http://u:sec/ret@host", "http://host"),
        ("s3://k:s/ec@b/x", "s3://b/x"),
        ("http://u:s ec'@host/x", "http://host/x"),
        ("http://host/x?x=1 y=2", "http://host/x?..."),
        ("http://host/x?a='secret'", "http://host/x?..."),
        ("http://u:p?w@host/x", "http://...?..."),
        ("http://host/x?sig=a@b", "http://...?..."),
        ("http://host/a/b", "http://host/a/b"),
    ):
        assert shown(url) == text
    assert shown_text("no 'https://me:p@w@host/x' nor s3://k:s/e@b/y") == "no 'https://host/x' nor s3://b/y"
    assert shown_text("404, url='http://host/x?a='s' b=t'\nmore") == "404, url='http://host/x?...\nmore"
