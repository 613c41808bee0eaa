"""The cache of remote shards: shared by processes, never torn, within its limit, and what happens on a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from shard_server import ShardServer, good, in_turn, slow, write_split

from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.remote import fetch as remote
from oat_dist.data.remote import shard_cache
from oat_dist.data.remote.shard_cache import RemoteFile, ShardCache, default_cache_dir
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

ROOT = Path(__file__).parents[2]

READ_ALL = """
import os, sys
import numpy as np
from oat_dist.data.index import open_split
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes

url, cache, limit, processes = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None, int(sys.argv[4])
children = []
for number in range(processes):
    pid = os.fork()
    if pid == 0:
        try:
            reader = ShardReader(open_split(url, cache_dir=cache, cache_limit=limit))
            reader.prefetch(np.arange(len(reader.shards)))
            line = sha256_bytes(b"".join(reader.read(i) for i in range(len(reader.shards))))
            reader.close()
        except DataError as error:
            line = f"error: {error}"
        os.write(1, f"{line}\\n".encode())
        os._exit(0)
    children.append(pid)
print("started", flush=True)
for pid in children:
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("served")
    return folder, write_split(folder / "train", shards=5, samples=4)


@pytest.fixture
def server(packed: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ShardServer(packed[0]) as server:
        yield server


def readers(server: ShardServer, cache: Path, *, limit: int = 0, processes: int = 1) -> subprocess.Popen[str]:
    """Start processes that read the whole split and print its SHA-256, or the error."""
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/train", str(cache), str(limit), str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def whole(packed: tuple[Path, list[bytes]]) -> str:
    return sha256_bytes(b"".join(packed[1]))


def held(cache: Path) -> int:
    """Bytes of all files in the cache, also of those that are being fetched."""
    total = 0
    for file in cache.glob("shards/*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def opened(server: ShardServer, cache: Path, shards: float | None = None) -> ShardSet:
    """The split, with a cache for so many of its shards (and the index)."""
    split = open_split(f"{server.url}/train", cache_dir=cache)
    if shards is None:
        return split
    limit = split.manifest.index["size"] + int(shards * split.manifest.shards[0].size)
    return open_split(f"{server.url}/train", cache_dir=cache, cache_limit=limit)


def use(shards: ShardSet, number: int) -> None:
    """Let one shard be read."""
    ShardReader(shards).read(int(np.flatnonzero(shards.index.shard == number)[0]))


def kept(shards: ShardSet) -> list[int]:
    return [number for number, file in enumerate(shards.remote_shards()) if shards.cache.holds(file)]


def path_of(shards: ShardSet, number: int) -> Path:
    return shards.cache.folder / "shards" / shards.manifest.shards[number].sha256


# Several processes.


def test_processes_that_start_together_fetch_each_shard_once(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    for number in range(5):
        server.behaviours[f"train-{number:06d}.tar"] = slow(0.1)
    server.behaviours["index.safetensors"] = slow(0.2)
    job = readers(server, tmp_path, processes=3)
    lines = job.communicate(timeout=60)[0].split()
    assert sorted(lines) == sorted(["started", *[whole(packed)] * 3])
    assert server.requests.pop("manifest.json") == 3
    assert len(server.requests) == 6 and set(server.requests.values()) == {1}


def test_processes_share_a_cache_that_is_too_small(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """All read the right bytes, and at no moment is there more than the limit."""
    shards = opened(server, tmp_path, 2.5)
    assert shards.cache.limit is not None
    job = readers(server, tmp_path, limit=shards.cache.limit, processes=3)
    most = 0
    while job.poll() is None:
        most = max(most, held(tmp_path))
        time.sleep(0.002)
    most = max(most, held(tmp_path))
    assert job.stdout is not None
    assert sorted(job.stdout.read().split()) == sorted(["started", *[whole(packed)] * 3])
    job.stdout.close()
    assert shards.manifest.index["size"] + 2 * shards.manifest.shards[0].size <= most <= shards.cache.limit
    assert list(tmp_path.glob("shards/*.part")) == []


def test_a_killed_process_leaves_no_half_shard(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    server.behaviours["train-000000.tar"] = in_turn(slow(60), good)
    job = readers(server, tmp_path)
    until = time.monotonic() + 30
    name = open_split(packed[0] / "train").manifest.shards[0].sha256
    part = tmp_path / "shards" / f"{name}.part"
    while not (part.exists() and part.stat().st_size and any(part.read_bytes()[:512])):  # half of it is written
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert part.exists() and not (tmp_path / "shards" / name).exists()
    # it has the size of the whole, but another name: the next one begins anew
    assert part.stat().st_size == (packed[0] / "train/train-000000.tar").stat().st_size
    shards = open_split(f"{server.url}/train", cache_dir=tmp_path)
    reader = ShardReader(shards)
    assert [reader.read(i) for i in range(20)] == packed[1]
    assert server.requests["train-000000.tar"] == 2 and not part.exists()


def test_what_the_dead_left_is_removed_and_what_the_living_fetch_is_not(server: ShardServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path)
    dead, alive = (tmp_path / "shards" / f"{letter * 64}.part" for letter in "ab")
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        file.write(b"half")
        fcntl.flock(file, fcntl.LOCK_EX)
        use(shards, 0)
        assert not dead.exists() and alive.exists()
    use(shards, 1)
    assert not alive.exists()


# The limit.


def test_what_was_used_longest_ago_goes_first(server: ShardServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path, 3)
    for number in (0, 1, 2):
        use(shards, number)
        os.utime(path_of(shards, number), (1000 + number, 1000 + number))
    assert kept(shards) == [0, 1, 2]
    use(opened(server, tmp_path, 3), 0)  # by another process: it counts for all
    assert path_of(shards, 0).stat().st_mtime > 10**9
    use(shards, 3)
    assert kept(shards) == [0, 2, 3]
    use(shards, 4)
    assert kept(shards) == [0, 3, 4]
    assert held(tmp_path) <= (shards.cache.limit or 0)
    assert server.requests["train-000000.tar"] == 1
    use(opened(server, tmp_path, 1), 0)  # the limit of whoever fetches next
    assert len(kept(shards)) == 3
    use(opened(server, tmp_path, 1), 1)
    assert kept(shards) == [1]


def test_what_is_open_stays(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    shards = opened(server, tmp_path, 1.5)
    descriptor = shards.cache.open(shards.remote_shards()[0])
    with pytest.raises(
        DataError, match=r"no room for [\d,]+ bytes more: all that is in this cache of .*raise data.cach"
    ):
        use(shards, 1)
    assert kept(shards) == [0] and list(tmp_path.glob("shards/*.part")) == []
    os.close(descriptor)
    use(shards, 1)
    assert kept(shards) == [1]


def test_nothing_is_removed_where_that_makes_no_room(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    shards = opened(server, tmp_path, 2.5)
    use(shards, 1)
    descriptor = shards.cache.open(shards.remote_shards()[0])
    small = opened(server, tmp_path, 1.5)  # a run with a smaller limit: what is open leaves no room in it
    with pytest.raises(DataError, match="no room for"):
        use(small, 2)
    assert kept(shards) == [0, 1]
    os.close(descriptor)
    use(small, 2)
    assert kept(shards) == [2]


AS_ANOTHER_USER = """
import os, sys
import numpy as np
from oat_dist.data.index import open_split
from oat_dist.data.remote import shard_cache
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError

shard_cache.ROOM_WAIT_S = 0.3
size, index = int(sys.argv[2]), int(sys.argv[3])
tight, wide = (open_split(sys.argv[1], cache_dir=".", cache_limit=index + int(n * size)) for n in (2.5, 3.5))
os.seteuid(65534)
for shards, number in ((tight, 2), (wide, 2), (wide, 3)):
    try:
        ShardReader(shards).read(int(np.flatnonzero(shards.index.shard == number)[0]))
    except DataError as error:
        print(error)
    print([k for k, file in enumerate(shards.remote_shards()) if shards.cache.holds(file)])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="files of two users need root")
def test_files_of_another_user_count_as_used(server: ShardServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path)
    use(shards, 0)
    use(shards, 1)
    tmp_path.chmod(0o777)
    (tmp_path / "shards").chmod(0o1777)
    path_of(shards, 0).chmod(0o600)
    dead = tmp_path / "shards" / f"{'a' * 64}.part"
    dead.write_bytes(b"half")
    sizes = [str(shards.manifest.shards[0].size), str(shards.manifest.index["size"])]
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, f"{server.url}/train", *sizes],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,  # a relative folder: the ones above are closed to others
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    refused, *rest = done.stdout.splitlines()
    assert refused.startswith(".: no room for ") and dead.exists()
    assert rest == ["[0, 1]", "[0, 1, 2]", "[0, 1, 3]"]  # its own goes


def test_an_index_in_use_is_not_removed(
    server: ShardServer, packed: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oat_dist.data.index.READ_LIMIT", 0)  # mapped, as a large one
    shards = opened(server, tmp_path, 1)
    index = tmp_path / "shards" / shards.manifest.index["sha256"]
    os.utime(index, (1, 1))
    reader = ShardReader(shards)
    assert [reader.read(i) for i in range(20)] == packed[1]
    assert index.exists() and server.requests["index.safetensors"] == 1


def test_what_is_announced_does_not_push_out_what_is_read(server: ShardServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path, 2)
    files, stop = shards.remote_shards(), threading.Event()
    use(shards, 0)
    use(shards, 1)
    assert not shards.cache.fetch_ahead(files[2], stop) and kept(shards) == [0, 1]
    assert server.requests["train-000002.tar"] == 0
    past = time.time() - shard_cache.IDLE_S - 1
    os.utime(path_of(shards, 0), (past, past))
    assert shards.cache.fetch_ahead(files[2], stop) and kept(shards) == [1, 2]


def test_a_shard_larger_than_the_cache_is_refused_at_once(server: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-000000.tar has [\d,]+ bytes, more than the cache may hold .*cache_gb"):
        open_split(f"{server.url}/train", cache_dir=tmp_path, cache_limit=20_000)
    assert server.requests["train-000000.tar"] == 0


def test_a_file_that_somebody_damaged_is_fetched_again(server: ShardServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path)
    use(shards, 0)
    os.truncate(path_of(shards, 0), 100)
    use(shards, 0)
    assert server.requests["train-000000.tar"] == 2


# The disk.

FULL = """
import sys
from oat_dist.data.index import open_split
from oat_dist.data.storage import ShardReader
from oat_dist.errors import DataError
reader = ShardReader(open_split(sys.argv[1], cache_dir=sys.argv[2]))
try:
    for i in range(len(reader.shards)):
        reader.read(i)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["limit of the process", "small disk"])
def test_a_full_disk_is_named_with_what_is_needed(server: ShardServer, tmp_path: Path, kind: str) -> None:
    """A tmpfs of 16 KiB where mounting is permitted; everywhere, a bound on the files that a process may write."""
    cache = tmp_path / "cache"
    cache.mkdir()
    size = (server.folder / "train/train-000000.tar").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)]
    mounted = kind == "small disk" and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL, f"{server.url}/train", str(cache)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.startswith(f"{cache}: the disk is full: {server.url}/train/train-00000")
        assert f" needs {size:,} bytes, " in done.stdout and "data.cache_dir to a larger disk" in done.stdout
        assert done.stdout.count("\n") == 1 and done.stderr == ""
        assert list(cache.glob("shards/*.part")) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(cache)], check=True)


def test_a_cache_that_is_no_folder(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=f"{tmp_path / 'file'}: the cache cannot be used .*set data.cache_dir to another"
    ):
        open_split(f"{server.url}/train", cache_dir=tmp_path / "file")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OAT_DIST_CACHE", raising=False)
    assert default_cache_dir() == Path.home() / ".cache/oat_dist"
    monkeypatch.setenv("OAT_DIST_CACHE", "/scratch/me")
    assert default_cache_dir() == Path("/scratch/me") and default_cache_dir("~/x") == Path.home() / "x"
    assert ShardCache("/a").folder == Path("/a")


def test_files_of_unknown_checksum_are_told_apart_by_their_whole_url(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    (tmp_path / "shards").mkdir()
    files = [RemoteFile(f"http://host/get?file={name}", 10, "") for name in "ab"]
    (cache._path(files[0])).write_bytes(bytes(10))
    assert cache.holds(files[0]) and not cache.holds(files[1])
