"""Files behind URLs, through fsspec: opened, fetched whole with checks and retries, and named without their secrets."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import posixpath
import random
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from oat_dist.errors import DataError

__all__ = [
    "NotThereError",
    "StoppedError",
    "download",
    "fetch_bytes",
    "is_url",
    "join_location",
    "local_path",
    "open_remote",
    "shown",
    "shown_text",
]

TRIES = 6
FIRST_DELAY_S = 1.0  # then twice as long each time: half a minute in all
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 30.0, 60.0
_READ = 1 << 20
_BLOCK = 16 << 20  # of object stores, which are read in ranges

_OTHER_FILE = "make sure that file and manifest belong together and are whole, and start again"
_TRY_LATER = "check the URL, the network and the server, and start again"
_CREDENTIALS = "give it the credentials that it wants (see docs/remote.md)"
_WORDS = {
    "ClientPayloadError": "the connection was cut in the middle of the file",
    "ServerDisconnectedError": "the server hung up",
    "SocketTimeoutError": f"nothing came for {_READ_TIMEOUT_S:.0f} s",
}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HTTP = ("http://", "https://")
_LOCAL = re.compile(r"(file|local)://", re.IGNORECASE)  # what fsspec calls the local disk
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

T = TypeVar("T")


class NotThereError(DataError):
    """There is no file at that URL."""


class StoppedError(Exception):
    """Whoever wanted the file has been told to stop."""


class _FailedError(Exception):
    """One try failed: what happened and the remedy. `most_tries`: more will not help."""

    def __init__(self, what: str, remedy: str, most_tries: int = TRIES) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what
        self.most_tries = most_tries


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether this is a URL other than a local file's."""
    return isinstance(location, str) and bool(_URL.match(location)) and not _LOCAL.match(location)


def local_path(location: str | os.PathLike[str]) -> str:
    """The path of a location that is no URL, or a file:// or local:// URL."""
    return _LOCAL.sub("", os.fspath(location), count=1) if _LOCAL.match(os.fspath(location)) else os.fspath(location)


def join_location(folder: str, name: str) -> str:
    """The location of `name` (a relative path) in a folder given as URL; the query of an http URL stays at its end."""
    scheme, _, rest = folder.partition("://")
    query = ""
    if folder.startswith(_HTTP):
        rest, mark, text = rest.partition("?")
        name, query = quote(name), mark + text
    host, _, path = rest.partition("/")
    path = posixpath.normpath("/" + "/".join(part for part in (path.strip("/"), name) if part))
    return f"{scheme}://{host}{path}{query}"


def shown(url: str) -> str:
    """A single URL as it may be printed: without user, password and query, which may hold a signature.

    Whatever could be a part of a password is left out, so all up to the last "@".
    """
    scheme = _URL.match(url)
    if scheme is None:
        return shown_text(url)
    head, mark, query = url.partition("?")
    if "@" in query:  # a password with "?", or a query with "@": nothing tells which
        return f"{scheme[0]}...?..."
    return re.sub(r"(://).*@", r"\1", head, flags=re.DOTALL) + (mark and "?...")


def shown_text(text: str) -> str:
    """A text, such as a package's error, as it may be printed: its URLs without their secrets.

    Nothing marks where a query ends: the rest of its line goes.
    """
    return re.sub(r"\?\S.*", "?...", re.sub(r"(://)[^\s'\"]*@", r"\1", text))


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[BinaryIO]:
    """The file at `url` as a stream to read once from start to end.

    Errors are those of fsspec and of the protocol's package, but:

    Raises:
        DataError: the protocol is unknown, or its package is not installed.
    """
    if url.startswith(_HTTP):
        # One request, read as it comes in. Any size given spares fsspec a request that asks for it.
        options: dict[str, Any] = {"block_size": 0, "size": 1}
    else:
        options = {"block_size": _BLOCK, "cache_type": "readahead"}
    with _filesystem(url).open(url, "rb", **options) as file:
        yield file


def fetch_bytes(url: str) -> bytes:
    """The whole file at `url`, a small one.

    Raises:
        DataError: it cannot be fetched; names URL, cause and remedy. NotThereError: there is none.
    """

    def once() -> bytes:
        with _failures(url):
            return _filesystem(url).cat_file(url)

    return _retried(url, once, threading.Event())


def download(url: str, descriptor: int, size: int, sha256: str, stop: threading.Event) -> None:
    """Write what lies at `url` to an open file, from its start, checked while it comes in.

    Args:
        descriptor: of the file.
        size: bytes it must have.
        sha256: in hex; "": not checked.
        stop: set by another thread to give up soon.

    Raises:
        DataError: it cannot be fetched, or is not the file it should be; names URL, cause and remedy.
        StoppedError: `stop` was set.
        OSError: the file cannot be written to.
    """

    def once() -> None:
        digest, received = hashlib.sha256(), 0
        with contextlib.closing(_chunks(url)) as chunks:
            for chunk in chunks:
                if stop.is_set():
                    raise StoppedError
                if received + len(chunk) > size:
                    raise _FailedError(f"it is longer than the {size:,} bytes of the manifest", _OTHER_FILE, 1)
                _write(descriptor, chunk, received)
                digest.update(chunk)
                received += len(chunk)
        if received != size:
            raise _FailedError(f"it ended after {received:,} of {size:,} bytes", _OTHER_FILE)
        if sha256 and digest.hexdigest() != sha256:
            raise _FailedError("its SHA-256 is not that of the manifest", _OTHER_FILE, 2)

    _retried(url, once, stop)


def _chunks(url: str) -> Generator[bytes, None, None]:
    with _failures(url), open_remote(url) as file:
        while chunk := file.read(_READ):
            yield chunk


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _retried(url: str, once: Callable[[], T], stop: threading.Event) -> T:
    for number in itertools.count(1):
        try:
            return once()
        except _FailedError as failure:
            most = min(TRIES, failure.most_tries)
            if number >= most:
                tries = "" if number == 1 else f" in {number} tries"
                raise DataError(f"{shown(url)}: cannot be fetched{tries}: {failure}") from None
            _say(f"{shown(url)}: {failure.what}; trying again ({number + 1} of {most})")
        # Up to half as long again, by chance: not all ranks at once.
        if stop.wait(FIRST_DELAY_S * 2 ** (number - 1) * (1 + random.random() / 2)):
            raise StoppedError
    raise AssertionError


def _say(text: str) -> None:
    """One line on stderr, from the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    """Turn what fsspec and its packages raise into `_FailedError`, or into `NotThereError`."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise NotThereError(f"{shown(url)}: it is not there; check the URL, or restore the file") from None
    except Exception as error:  # each protocol's package has exceptions of its own
        raise _judged(error, url) from None


def _judged(error: Exception, url: str) -> _FailedError:
    name, status = type(error).__name__, getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 600:
        what = f"HTTP {status} {getattr(error, 'message', '')}".strip()
        if status in (401, 403):
            return _FailedError(what, _CREDENTIALS, 1)
        return _FailedError(what, _TRY_LATER, TRIES if status >= 500 or status in (408, 425, 429) else 1)
    # The whole URL first: where it ends is known of this one.
    text = _WORDS.get(name) or shown_text(str(error).replace(url, shown(url))).partition("\n")[0]
    if isinstance(error, PermissionError) or "Credentials" in name:
        return _FailedError(f"{name}: {text}", _CREDENTIALS, 1)
    return _FailedError(f"{name}: {text}".rstrip(": "), _TRY_LATER, 1 if isinstance(error, ValueError) else TRIES)


def _filesystem(url: str) -> Any:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        if url.startswith(_HTTP):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
            # trust_env: the proxies of HTTP_PROXY and its like
            return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout, "trust_env": True})
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else str(error)
        raise DataError(f"{shown(url)}: reading {scheme}:// needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise DataError(f"{shown(url)}: {shown_text(str(error))}; give a path, or a URL that fsspec knows") from None
