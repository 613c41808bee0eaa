"""One pass over a tar from any stream: what lies where, the content of what is wanted, and the SHA-256 of it all.

Python's tarfile takes longer over a small image than decoding it does, and ends silently at a damaged header. This
reader knows ustar, GNU long names and PAX records, and says what it meets instead of a whole, plain tar. A member's
name is text to it and never becomes a path.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator

from oat_dist.errors import DataError

__all__ = ["TarStream"]

_BLOCK = 512
_CHUNK = 1 << 20  # fits into the cache of a core
_ZEROS = bytes(_BLOCK)
_REGULAR = b"0\x007"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes: their size field, if any, is not of content here
_EXTENSIONS = _LONG_NAME, _LONG_LINK, _PAX, _PAX_SOLARIS, _PAX_GLOBAL = tuple(b"LKxXg")
_SPARSE = ord("S")
# name, size, checksum, kind, magic, first byte of the prefix
_FIELDS = struct.Struct("100s 24x 12s 12x 8s B 100x 6s 82x B 166x").unpack

_LARGEST_EXTENSION = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}

_DAMAGED = "damaged header at byte {at:,}; restore the tar"
_SPARSE_TEXT = "member {name} is stored sparse; write the tar anew, without --sparse"


class TarStream:
    """Iterate for the regular files; within the loop `content()` gives the bytes of the present one.

    After the loop `size` and `digest()` are those of the whole tar. Errors are `DataError`s with the bare reason:
    the caller knows the file. What `read` raises goes through.

    Args:
        read: gives up to so many bytes, and none only at the end.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.size = 0
        self._read = read
        self._hash = hashlib.sha256()
        self._window, self._start, self._at = b"", 0, 0  # bytes at hand, where in the file they begin, the next of them
        self._size = 0  # of the file last yielded

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """(name, place of the content in bytes from the tar's start, its size) of every regular file."""
        named: dict[str, str] = {}  # what extension headers say of the next member
        everywhere: dict[str, str] = {}  # and of all that follow
        while True:
            header = self._window[self._at : self._at + _BLOCK]
            if len(header) < _BLOCK:
                header = self._more()
            if header[0] == 0 and header == _ZEROS:
                break
            raw_name, digits, checksum, kind, magic, prefix = _FIELDS(header)
            try:
                # Adler-32's lower half is 1 + the sum of the bytes modulo 65,521: far quicker than adding them up here
                intact = (zlib.adler32(header) & 0xFFFF) - 1 - sum(checksum) + 256 == int(checksum[:6], 8)
                size = int(digits.partition(b"\0")[0], 8)
            except ValueError:
                intact = False
            if not intact or size < 0:
                size = self._odd_size(header)
            self._at += _BLOCK
            start = self._start + self._at
            if kind in _EXTENSIONS:
                self._read_extension(kind, size, start, named, everywhere)
                continue
            name = raw_name.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            if prefix and magic == b"ustar\0":
                name = f"{_text(header[345:500])}/{name}"
            if named or everywhere:
                known = {**everywhere, **named}
                name, size = known.get("path", name), _whole(known.get("size", str(size)), start)
                if any(key.startswith("GNU.sparse.") for key in known):
                    raise DataError(_SPARSE_TEXT.format(name=name))
                named = {}
            if kind in _REGULAR:
                if kind or not name.endswith("/"):  # kind 0 is that of tars older than folders
                    self._size = size
                    yield name, start, size
            elif kind in _WITHOUT_CONTENT:
                continue
            elif kind == _SPARSE:
                raise DataError(_SPARSE_TEXT.format(name=name))
            end = start + (size + 511) // 512 * 512
            self._at = end - self._start
            if self._at > len(self._window):
                self._skip_to(end)
        self._drain()

    def content(self) -> bytes:
        """The bytes of the file last yielded, all at once; may be called once for each."""
        start, end = self._at, self._at + self._size
        if end > len(self._window):
            if not self._fill(self._size):
                raise DataError(self._cut_short())
            start, end = 0, self._size
        self._at = end
        return self._window[start:end]

    def digest(self) -> str:
        """SHA-256 in hex of what was read; after an error of the tar, `exhaust` first."""
        return self._hash.hexdigest()

    def exhaust(self) -> None:
        """Read what is left without looking at it."""
        while self._next_chunk():
            pass

    def _next_chunk(self) -> bytes:
        chunk = self._read(_CHUNK)
        self._hash.update(chunk)
        self.size += len(chunk)
        return chunk

    def _fill(self, count: int) -> bool:
        """Have `count` bytes at hand; False where the file ends before."""
        missing = count - (len(self._window) - self._at)
        if missing <= 0:
            return True
        parts = [self._window[self._at :]]
        while missing > 0 and (chunk := self._next_chunk()):
            parts.append(chunk)
            missing -= len(chunk)
        self._start += self._at
        self._window, self._at = b"".join(parts), 0
        return missing <= 0

    def _read_extension(
        self, kind: int, size: int, start: int, named: dict[str, str], everywhere: dict[str, str]
    ) -> None:
        """A header whose content speaks of the next member, or of all that follow."""
        padded = (size + 511) // 512 * 512
        if size > _LARGEST_EXTENSION:
            raise DataError(_DAMAGED.format(at=start - _BLOCK))
        if not self._fill(padded):
            raise DataError(self._cut_short())
        data = self._window[self._at : self._at + size]
        self._at += padded
        if kind == _LONG_NAME:
            named["path"] = _text(data)
        elif kind != _LONG_LINK:
            (everywhere if kind == _PAX_GLOBAL else named).update(_pax_records(data, start))

    def _skip_to(self, position: int) -> None:
        """Go on at `position`, behind what is at hand, without keeping what lies between."""
        while position > self._start + len(self._window):
            self._start += len(self._window)
            self._window = self._next_chunk()
            if not self._window:
                raise DataError(self._cut_short())
        self._at = position - self._start

    def _more(self) -> bytes:
        """The next header where the window ends within it."""
        if not self._fill(_BLOCK):
            raise DataError(self._cut_short())
        return self._window[self._at : self._at + _BLOCK]

    def _odd_size(self, header: bytes) -> int:
        """The size of a member whose header is unusual: read in full, where it is a header at all."""
        try:
            claimed = int(header[148:156].partition(b"\0")[0], 8)
            rest = header[:148] + b"        " + header[156:]
            # a sum that Adler-32 wraps around, other numbers of digits, and old tars, which summed signed bytes
            if claimed in (sum(rest), sum(byte - 256 * (byte > 127) for byte in rest)):
                if header[124] == 0x80:  # what does not fit octal digits, as GNU tar writes it
                    return int.from_bytes(header[125:136], "big")
                size = int(header[124:136].partition(b"\0")[0].strip() or b"0", 8)
                if size >= 0:
                    return size
        except ValueError:
            pass
        raise DataError(self._no_header(header))

    def _no_header(self, header: bytes) -> str:
        if self._start + self._at:
            return _DAMAGED.format(at=self._start + self._at)
        for magic, (kind, tool) in _COMPRESSED.items():
            if header.startswith(magic):
                return (
                    f"compressed with {kind}: samples cannot be read in place; unpack it to a plain .tar: {tool} FILE"
                )
        return "not a tar"

    def _cut_short(self) -> str:
        if not self.size:
            return "the file is empty; restore the tar"
        return f"cut short: ends after {self.size:,} bytes without the end marker of a tar; restore it"

    def _drain(self) -> None:
        """Read on to the end of the file: nothing but zeros may follow the end marker."""
        chunk = self._window[self._at :]
        while chunk or (chunk := self._next_chunk()):
            if chunk.strip(b"\0"):
                raise DataError(
                    "goes on after the end marker of a tar, where no reader looks (tars joined with cat?); "
                    "write it anew as one tar"
                )
            chunk = b""


def _whole(text: str, start: int) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise DataError(_DAMAGED.format(at=start - _BLOCK))
    return int(text)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """`{key: value}` of the records that matter, each "LENGTH KEY=VALUE\\n" with the length of all of it."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        digits = data[at : at + 12].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not len(digits) < length <= len(data) - at or not equals or not record.endswith(b"\n"):
            raise DataError(_DAMAGED.format(at=start - _BLOCK))
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        at += length
    return found
