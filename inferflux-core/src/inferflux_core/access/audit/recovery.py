"""Where the chain stands when the server starts, from the end of what the last one left.

Only the last lines are read, whatever the size of the log. A last line without an end is what a crash leaves: the
writer takes it out of the file and puts it into a record `log.recovered`, so that the log is a plain chain again. Anything else
that is not as this server wrote it is no crash, and stops the start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from inferflux_core.access.audit.chain import GENESIS, MAX_LINE, Record, read_record
from inferflux_core.access.audit.rotation import ROTATE, ClosedFile, add_to_manifest, closed_files, read_manifest
from inferflux_core.errors import ConfigError

_CURE = (
    "Run 'inferctl audit verify' to see where, keep the files as evidence, and move them (with the checkpoints) away to "
    "begin a new log."
)


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """Where to go on.

    Attributes:
        seq, hash: of the last record; 0 and `GENESIS` for a new log.
        end: length in bytes of the open file up to and with that record; 0 if it is in a closed file.
        torn: what follows it, the beginning of a line; empty after anything but a crash.
        is_rotated: that record is the last one of its file, and the file is still to be closed.
        first_seq: number of the first record in the open file.
    """

    seq: int
    hash: str
    end: int
    torn: bytes
    is_rotated: bool
    first_seq: int


def find_end(log: Path, key: bytes) -> ChainEnd:
    """Find the end of a log.

    Raises:
        ConfigError: the last record was not written with this key, or the open file of a log is gone.
        OSError: it cannot be read.
    """
    last, end, torn, first_seq = _last_record(log, key)
    if last is not None:
        return ChainEnd(last.seq, last.hash, end, torn, last.event == ROTATE, first_seq)
    closed = closed_files(log)
    if not closed:
        return ChainEnd(0, GENESIS, 0, torn, False, 1)
    newest = closed[-1][1]
    last, end, rest, _ = _last_record(newest, key)
    if last is None or rest or last.event != ROTATE:
        raise ConfigError(
            f"the audit log {str(log)!r} is missing or empty, but {str(newest)!r} was not the last of its files. {_CURE}"
        )
    return ChainEnd(last.seq, last.hash, 0, torn, False, last.seq + 1)


def complete_manifest(log: Path, key: bytes) -> None:
    """Add the newest closed file to the manifest, if a crash came between closing it and that.

    Raises:
        OSError: it cannot be read or written.
        ConfigError: see `find_end`.
    """
    closed = closed_files(log)
    if not closed:
        return
    newest = closed[-1][1]
    if any(entry.file == newest.name for entry in read_manifest(log, key)):
        return
    last, end, _, first_seq = _last_record(newest, key)
    if last is not None:
        add_to_manifest(log, key, ClosedFile(newest.name, first_seq, last.seq, last.hash, end))


def _last_record(path: Path, key: bytes) -> tuple[Record | None, int, bytes, int]:
    """The last record of a file, where it ends, what follows it, and the number of the file's first record."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None, 0, b"", 0
    with file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - 2 * MAX_LINE - 2)
        file.seek(start)
        tail = file.read(size - start)
        file.seek(0)
        first_line = file.readline(MAX_LINE + 1)
    complete = tail.rfind(b"\n") + 1
    torn = tail[complete:]
    if complete == 0:
        if len(torn) > MAX_LINE:
            raise ConfigError(f"{str(path)!r} is not an audit log: it has no lines. Move it away, or set audit.file.")
        return None, 0, torn, 0
    begin = tail.rfind(b"\n", 0, complete - 1) + 1
    try:
        last, first = read_record(tail[begin:complete]), read_record(first_line)
    except ValueError as error:
        raise ConfigError(f"the audit log {str(path)!r} was changed by something else: {error}. {_CURE}") from error
    if not last.is_authentic(key):
        raise ConfigError(
            f"record {last.seq} of the audit log {str(path)!r} was not written with the key of this server, or was changed. "
            f"{_CURE}"
        )
    return last, start + complete, torn, first.seq
