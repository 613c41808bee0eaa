"""A small split of random bytes, and an HTTP server that hands it out as well or as badly as a test wants."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import numpy as np

from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Index, Manifest, ShardInfo
from oat_dist.files import sha256_bytes

# What a reply does to the bytes of a file: writes them, or not, and how. True: a reply was sent.
Behaviour = Callable[["Handler", bytes], bool]


def write_split(
    folder: Path, *, shards: int = 4, samples: int = 6, size: int = 3000, classes: int = 3, seed: int = 0
) -> list[bytes]:
    """Write a split of `shards` tars of `samples` samples of `size` random bytes each; the samples by id.

    As packers do, ids are spread over the shards at random.
    """
    random = np.random.default_rng(seed)
    number = shards * samples
    data = [random.bytes(size) for _ in range(number)]
    labels = [i % classes for i in range(number)]
    order = random.permutation(number)
    rows = {name: np.zeros(number, dtype=np.int64) for name in ("shard", "offset", "length", "width", "height")}
    infos = []
    folder.mkdir(parents=True)
    for shard in range(shards):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in order[shard * samples : (shard + 1) * samples].tolist():
                for name, content in ((f"{i:08d}.jpg", data[i]), (f"{i:08d}.cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    if name.endswith("jpg"):
                        end = -(-size // 512) * 512
                        rows["shard"][i], rows["offset"][i], rows["length"][i] = shard, file.tell() - end, size
        content, name = file.getvalue(), f"train-{shard:06d}.tar"
        (folder / name).write_bytes(content)
        infos.append(ShardInfo(name, samples, len(content), sha256_bytes(content)))
    index = Index.from_rows({**rows, "label": labels}, [f"{i:04d}.jpg" for i in range(number)]).to_bytes()
    (folder / INDEX_NAME).write_bytes(index)
    manifest = Manifest(
        split="train",
        source="test",
        seed=seed,
        classes=[f"class {k}" for k in range(classes)],
        class_counts=np.bincount(labels, minlength=classes).tolist(),
        num_samples=number,
        num_bytes=number * size,
        image_sizes={},
        shards=infos,
        index={"file": INDEX_NAME, "size": len(index), "sha256": sha256_bytes(index)},
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return data


class Handler(BaseHTTPRequestHandler):
    """GET of a file below the server's folder, through its behaviour for that name."""

    protocol_version = "HTTP/1.1"
    server: ShardServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        with self.server.lock:
            self.server.requests[name] += 1
            self.server.agents.append(self.headers.get("Authorization", ""))
        behaviour = self.server.behaviours.get(name, good)
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
        elif not behaviour(self, path.read_bytes()):
            self.close_connection = True

    def send(self, data: bytes, length: int | None = None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def good(handler: Handler, data: bytes) -> bool:
    handler.send(data)
    return True


def cut(handler: Handler, data: bytes) -> bool:
    """The connection ends in the middle."""
    handler.send(data[: len(data) // 2], len(data))
    return False


def short(handler: Handler, data: bytes) -> bool:
    """Half the file, and it says so."""
    handler.send(data[: len(data) // 2])
    return True


def long(handler: Handler, data: bytes) -> bool:
    handler.send(data + b"more")
    return True


def altered(handler: Handler, data: bytes) -> bool:
    handler.send(data[:-1] + bytes([data[-1] ^ 1]))
    return True


def hang_up(handler: Handler, data: bytes) -> bool:
    """No reply at all."""
    return False


def status(code: int) -> Behaviour:
    def reply(handler: Handler, data: bytes) -> bool:
        handler.send(b"sorry", status=code)
        return True

    return reply


def slow(seconds: float) -> Behaviour:
    """Half the file at once, the rest later."""

    def reply(handler: Handler, data: bytes) -> bool:
        handler.send(data[: len(data) // 2], len(data))
        handler.wfile.flush()
        time.sleep(seconds)
        handler.wfile.write(data[len(data) // 2 :])
        return True

    return reply


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """One after the other, the last one from then on."""
    left = list(behaviours)

    def reply(handler: Handler, data: bytes) -> bool:
        return (left.pop(0) if len(left) > 1 else left[0])(handler, data)

    return reply


class ShardServer(ThreadingHTTPServer):
    """Serves `folder` on a free port of this machine while it is entered.

    `behaviours` by file name change a reply; `requests` counts requests by file name.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.behaviours: dict[str, Behaviour] = {}
        self.requests: Counter[str] = Counter()
        self.agents: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is part of the tests."""

    def __enter__(self) -> ShardServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
