"""Reads the lines of a log, through all its files, while a server may be writing and rotating it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from inferflux_core.access.audit.chain import MAX_LINE
from inferflux_core.access.audit.rotation import closed_files

_BLOCK = 64 * 1024
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it stands in a file.

    Attributes:
        path: of the file.
        number: in the file, from 1.
        text: newline included; without one it is the torn end of the file, or longer than any record.
        is_closed: whether the file is one of the closed ones.
    """

    path: Path
    number: int
    text: bytes
    is_closed: bool


def read_log(log: Path, *, patience_s: float = 1.0) -> Iterator[Line]:
    """All lines, oldest first.

    Args:
        patience_s: seconds to wait for the rest of a last line, which a server may be writing just now.

    Raises:
        FileNotFoundError: at the end, if the open file of the log is missing.
        OSError: a file cannot be read.
    """
    for file, is_closed in _files(log, patience_s):
        path = Path(file.name)
        number = 0
        while line := _read_line(file, 0 if is_closed else patience_s):
            number += 1
            yield Line(path, number, line, is_closed)


def last_lines(log: Path, count: int) -> list[bytes]:
    """The last `count` lines, oldest first, from as many files as that takes.

    Raises:
        OSError: a file cannot be read.
    """
    lines: list[bytes] = []
    paths = [path for _, path in closed_files(log)] + ([log] if log.exists() else [])
    while paths and len(lines) < count:
        lines = _last_of_file(paths.pop(), count - len(lines)) + lines
    return lines


def follow_log(log: Path, wait: Callable[[], None]) -> Iterator[bytes]:
    """Lines as they are added after this call, without end, through all files that are begun.

    Args:
        wait: called when there is nothing new.

    Raises:
        OSError: a file cannot be read.
    """
    file: BinaryIO | None = None
    if log.exists():
        file = log.open("rb")
        block = max(0, file.seek(0, os.SEEK_END) - 2 * MAX_LINE)
        file.seek(block)
        file.seek(block + file.read().rfind(b"\n") + 1)  # where the line begins that may be half written
    return _follow(log, file, wait)


def _follow(log: Path, file: BinaryIO | None, wait: Callable[[], None]) -> Iterator[bytes]:
    while file is None:
        if log.exists():
            file = log.open("rb")
        else:
            wait()
    try:
        while True:
            at = file.tell()
            # Looked for before the end is read: whatever was written to this file until then is seen.
            following = _following(log, file)
            line = file.readline()
            if line.endswith(b"\n"):
                yield line
            elif following is None:
                file.seek(at)
                wait()
            else:
                file.close()
                file, following = following, None
            if following is not None:
                following.close()
    finally:
        file.close()


def _following(log: Path, file: BinaryIO) -> BinaryIO | None:
    """The file that comes after one that has been closed or lost; None while it is the open one."""
    own = os.fstat(file.fileno())
    try:
        if os.path.samestat(own, os.stat(log)):
            return None
        closed = [path for _, path in closed_files(log)]
        places = [index for index, path in enumerate(closed) if os.path.samestat(own, path.stat())]
        if places and places[0] + 1 < len(closed):
            return closed[places[0] + 1].open("rb")
        return log.open("rb")
    except FileNotFoundError:
        return None  # between two files


def _files(log: Path, patience_s: float) -> Iterator[tuple[BinaryIO, bool]]:
    done = 0
    give_up = time.monotonic() + patience_s
    while True:
        newer = [(number, path) for number, path in closed_files(log) if number > done]
        if newer:
            done = newer[0][0]
            with newer[0][1].open("rb") as file:
                yield file, True
            give_up = time.monotonic() + patience_s
            continue
        try:
            file = log.open("rb")
        except FileNotFoundError:  # for a moment, while it is rotated, there is none
            if time.monotonic() >= give_up and not any(number > done for number, _ in closed_files(log)):
                raise
            time.sleep(_POLL_S)
            continue
        with file:
            if any(number > done for number, _ in closed_files(log)):
                continue  # it was rotated in between: this may be the one after
            yield file, False
        return


def _read_line(file: BinaryIO, patience_s: float) -> bytes:
    at = file.tell()
    line = file.readline(MAX_LINE + 1)
    give_up = time.monotonic() + patience_s
    while line and not line.endswith(b"\n") and len(line) <= MAX_LINE and time.monotonic() < give_up:
        time.sleep(_POLL_S)
        file.seek(at)  # from its beginning: what a failed write left is cut off again
        line = file.readline(MAX_LINE + 1)
    return line


def _last_of_file(path: Path, count: int) -> list[bytes]:
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        tail = b""
        while at > 0 and tail.count(b"\n") <= count:
            size = min(_BLOCK, at)
            at -= size
            file.seek(at)
            tail = file.read(size) + tail
    return [line + b"\n" for line in tail.removesuffix(b"\n").split(b"\n")][-count:] if tail else []
