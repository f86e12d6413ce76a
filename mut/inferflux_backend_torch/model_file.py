"""Files of a model, opened and parsed with limits: regular files only, never more bytes than expected, JSON without traps."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inferflux_core.errors import ModelFileError

_MAX_JSON_BYTES = 10_000_000  # real files of configuration stay below 1 MB
_MAX_JSON_DEPTH = 64


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file, open for reading, as (file descriptor, length in bytes).

    Raises:
        ModelFileError: missing, unreadable, a folder, a pipe or a device.
    """
    try:
        # non-blocking, so that a named pipe in place of the file cannot hang the server
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; fetch the whole model again") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from None
    except ValueError:
        raise ModelFileError(f"{str(path)!r}: a path cannot hold a zero character") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: not a regular file; put the file itself there")
        yield fd, status.st_size
    finally:
        os.close(fd)


def read_exactly(fd: int, length: int, position: int) -> bytes:
    """`length` bytes from `position`; fewer only where the file ends before.

    Raises:
        OSError: the disk failed.
    """
    pieces = []
    while length > 0 and (piece := os.pread(fd, length, position)):
        pieces.append(piece)
        position += len(piece)
        length -= len(piece)
    return b"".join(pieces)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object, with all keys of all objects in it different, and nested at most 64 levels deep.

    Raises:
        ValueError: something else; the text says what, without naming a file.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    _check_depth(value)
    return value


def read_json(path: Path, what: str, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, such as `config.json`.

    Args:
        what: what the file is, for messages, e.g. `model configuration`.
        max_bytes: most bytes it may have.

    Raises:
        ModelFileError: missing or unreadable, too large, not UTF-8, not a JSON object, the same key twice, nested too deeply.
    """
    try:
        with open_regular(path) as (fd, size):
            if size > max_bytes:
                raise ValueError(f"it has {size} bytes, more than {max_bytes}")
            data = read_exactly(fd, size, 0)
        return parse_object(data)
    except OSError as error:
        raise ModelFileError(f"{path}: reading the {what} failed: {error.strerror}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: not a usable {what}: {error}; fetch the file again") from None


def read_optional_json(path: Path, what: str) -> dict[str, Any]:
    """As `read_json`, but {} where there is no such file."""
    return read_json(path, what) if os.path.lexists(path) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return result


def _check_depth(value: Any) -> None:
    """Level by level, so that this check itself cannot nest too deeply."""
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"its JSON is nested more than {_MAX_JSON_DEPTH} levels deep")
