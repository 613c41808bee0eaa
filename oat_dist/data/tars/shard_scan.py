"""Opens a shard where it lies, local or remote, and has it read once, from start to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from oat_dist.data.foreign.rules import Rules
from oat_dist.data.remote.fetch import is_url, open_remote, shown, shown_text
from oat_dist.data.tars.image_lots import Examine
from oat_dist.data.tars.tarsamples import ShardScan, scan_samples
from oat_dist.errors import DataError

__all__ = ["scan_shard"]

TRIES = 4
FIRST_DELAY_S = 1.0  # then twice as long each time


def scan_shard(
    location: str,
    rules: Rules,
    examine: Examine,
    *,
    threads: int = 1,
    advance: Callable[[int], None] = lambda n: None,
    count_bytes: Callable[[int], None] = lambda n: None,
) -> ShardScan:
    """`scan_samples` of the tar at a path or URL. A remote one is tried a few times.

    Raises:
        FileNotFoundError: a local one that is not there.
        DataError: it cannot be read, or (AmbiguousError) a sample has several images. A damaged tar is no error.
    """

    def scan(read: Callable[[int], bytes]) -> ShardScan:
        def counted(size: int) -> bytes:
            data = read(size)
            count_bytes(len(data))
            return data

        return scan_samples(counted, rules, examine, threads=threads, advance=advance)

    if not is_url(location):
        try:
            with Path(location).open("rb", buffering=0) as file:
                return scan(lambda size: file.read(size) or b"")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{location}: cannot be read ({error.strerror}); mend that and start again") from error
    for number in range(1, TRIES + 1):
        try:
            with open_remote(location) as stream:
                return scan(stream.read)
        except DataError:
            raise
        except Exception as error:  # the package of each protocol has exceptions of its own
            if number == TRIES or _final(error):
                raise DataError(
                    f"{shown(location)}: cannot be read ({_words(error)}); check the URL, the network and the server, "
                    "and start again"
                ) from None
        time.sleep(FIRST_DELAY_S * 2 ** (number - 1))
    raise AssertionError


def _final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, (FileNotFoundError, PermissionError))


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(status := getattr(error, "status", None), int):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    return f"{type(error).__name__}: {shown_text(str(error))}".partition("\n")[0].rstrip(": ")
