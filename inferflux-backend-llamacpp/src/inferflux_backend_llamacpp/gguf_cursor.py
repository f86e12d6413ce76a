"""Reads the header of a GGUF file front to back, never past its end and never more than it needs.

Plain `pread` in windows instead of a memory map: if somebody truncates the file meanwhile, or the disk fails, a map
would kill the whole server with SIGBUS, while a read gives an error. Walking a vocabulary's strings is just as fast.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from inferflux_core.errors import ModelFileError

_WINDOW = 1 << 20  # bytes read at once: the header of a usual model takes two to ten reads
_TEXT_BUDGET = 16 << 20  # bytes of keys, scalar values and tensor descriptions; real headers stay far below 1 MiB

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@contextmanager
def open_cursor(path: str, position: int = 0) -> Iterator[Cursor]:
    """Open a regular file for reading from `position`.

    Raises:
        ModelFileError: missing, unreadable, a folder or a device.
    """
    try:
        # non-blocking, so that a named pipe in place of the file cannot hang the server
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path of the model") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from None
    except ValueError:
        raise ModelFileError(f"{path!r}: a path cannot hold a zero character") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: not a regular file; name a .gguf file")
        yield Cursor(fd, path, status.st_size, position)
    finally:
        os.close(fd)


def fail(path: str, fault: str) -> NoReturn:
    raise ModelFileError(f"{path}: not a usable GGUF file: {fault}")


class Cursor:
    """A position in an open file, with checked reads.

    Attributes:
        path: the file, for messages.
        size: its length in bytes when opened.
        position: offset of the next byte to read.
    """

    __slots__ = ("_base", "_budget", "_fd", "_window", "path", "position", "size")

    def __init__(self, fd: int, path: str, size: int, position: int) -> None:
        self._fd = fd
        self._window = b""
        self._base = 0
        self._budget = _TEXT_BUDGET
        self.path = path
        self.size = size
        self.position = position

    def fail(self, fault: str) -> NoReturn:
        fail(self.path, fault)

    def need(self, length: int, what: str) -> None:
        """Raises ModelFileError unless `length` more bytes follow."""
        if length > self.size - self.position:
            self.fail(
                f"truncated: {what} at byte {self.position} takes {length} bytes, "
                f"but the file ends at byte {self.size}; fetch the file again"
            )

    def take(self, length: int, what: str) -> bytes:
        self.need(length, what)
        self._budget -= length
        if self._budget < 0:
            self.fail(f"keys, values and tensor descriptions take more than {_TEXT_BUDGET} bytes")
        start = self.position - self._base
        if start < 0 or start + length > len(self._window):
            self._load(max(length, _WINDOW))
            start = 0
            if length > len(self._window):
                self.fail(f"truncated while being read, in {what}")
        self.position += length
        return self._window[start : start + length]

    def unpack(self, layout: struct.Struct, what: str) -> int | float:
        (value,) = layout.unpack(self.take(layout.size, what))
        assert isinstance(value, int | float)
        return value

    def u32(self, what: str) -> int:
        return int(self.unpack(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.unpack(_U64, what))

    def string(self, what: str, *, limit: int | None = None) -> bytes:
        """A length-prefixed string.

        Args:
            limit: most bytes it may have.
        """
        length = self.u64(f"the length of {what}")
        if limit is not None and length > limit:
            self.fail(f"{what} has {length} bytes, more than {limit}")
        return self.take(length, what)

    def skip(self, length: int, what: str) -> None:
        self.need(length, what)
        self.position += length

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over `count` length-prefixed strings without keeping them."""
        self.need(count * _U64.size, what)  # each has at least its length; rejects absurd counts before the loop
        unpack = _U64.unpack_from
        while count:
            self._load(_WINDOW)
            window = self._window
            last = len(window) - _U64.size
            at = 0
            while count and at <= last:
                at += _U64.size + unpack(window, at)[0]
                count -= 1
            if not at:
                self.fail(f"truncated: {what} ends in the middle, at byte {self.size}; fetch the file again")
            self.skip(at, what)

    def strings(self, count: int, what: str) -> list[bytes]:
        """Read `count` length-prefixed strings, however long together."""
        texts = []
        for _ in range(count):
            self._budget = _TEXT_BUDGET
            texts.append(self.string(what))
        return texts

    def numbers(self, layout: struct.Struct, count: int, what: str) -> list[int | float]:
        """Read `count` numbers of one layout, however many."""
        self.need(count * layout.size, what)
        self._load(count * layout.size)
        if len(self._window) < count * layout.size:
            self.fail(f"truncated while being read, in {what}")
        return [value for (value,) in layout.iter_unpack(self._window)]

    def _load(self, length: int) -> None:
        try:
            self._window = os.pread(self._fd, length, self.position)
        except OSError as error:
            self.fail(f"reading byte {self.position} failed: {error.strerror}")
        self._base = self.position
