"""The log on disk: the open file with the end of its chain, and what becomes of it when it is full.

Every operation either does all it says or raises OSError and can simply be repeated.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inferflux_core.access.audit.append_file import AppendFile
from inferflux_core.access.audit.chain import Chain
from inferflux_core.access.audit.checkpoints import CheckpointWriter
from inferflux_core.access.audit.events import Json
from inferflux_core.access.audit.recovery import ChainEnd
from inferflux_core.access.audit.rotation import ROTATE, ClosedFile, add_to_manifest, closed_files, closed_name
from inferflux_core.private_files import sync_folder

_BATCH_BYTES = 1024 * 1024
_LOOK_INTERVAL_S = 1.0  # how often to look whether somebody moved the file away
_TORN_KEPT = 4096  # characters of a torn line that are kept


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to become a record. Tickets count what `AuditLog` handed over; 0 marks the writer's own."""

    fields: dict[str, Json]
    time_ns: int
    ticket: int = 0


class ChainedLog:
    """An audit log that is open for writing.

    Attributes:
        head: number of the last record.
        own_entries: what the log has to say about itself; to be appended before anything else.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        boot_id: str,
        end: ChainEnd,
        checkpoints: CheckpointWriter,
        *,
        max_bytes: int,
        keep_unsynced: bool,
    ) -> None:
        """Open the log where the chain ended, and take out what a crash left behind.

        Args:
            max_bytes: size at which a new file is begun.
            keep_unsynced: see `AppendFile`.

        Raises:
            OSError: it cannot be written.
        """
        self._path = path
        self._key = key
        self._boot_id = boot_id
        self._checkpoints = checkpoints
        self._max_bytes = max_bytes
        self._keep_unsynced = keep_unsynced
        self._chain = Chain(key, end.seq, end.hash)
        self._first_seq = end.first_seq
        self._is_full = end.is_rotated
        self._unlisted: ClosedFile | None = None  # has its new name, but is not in the manifest yet
        self._look_at = 0.0
        self.head = end.seq
        self.own_entries: list[Entry] = []
        self._file = AppendFile(path, keep_unsynced=keep_unsynced)
        try:
            if self._file.end != end.end:
                self._file.truncate(end.end)
            sync_folder(path.parent)
            if end.torn:
                kept = end.torn[:_TORN_KEPT].decode("ascii", "backslashreplace")
                self.note("log.recovered", torn_bytes=len(end.torn), torn=kept)
            self.prepare()
        except OSError:
            self._file.close()
            raise

    def note(self, event: str, **fields: Json) -> None:
        """Have the log say something about itself in its next record."""
        self.own_entries.append(Entry({"event": event, **fields}, time.time_ns()))

    def prepare(self) -> None:
        """Put right what failed before, close a full file, and begin a new one where somebody took the file away.

        Raises:
            OSError: it fails still.
        """
        self._file.repair()
        if self._is_full:
            self._begin_next()
        if self._unlisted is not None:
            add_to_manifest(self._path, self._key, self._unlisted)
            self._unlisted = None
        now = time.monotonic()
        if now >= self._look_at:
            if not self._file.is_in_place():
                self._replace_lost()
            self._look_at = now + _LOOK_INTERVAL_S

    def append(self, entries: Iterable[Entry]) -> int:
        """Write records for the first of the entries, as many as fit; call it again for the rest.

        Returns:
            For how many.

        Raises:
            OSError: nothing was written.
        """
        chain = self._chain
        seq, last_hash = chain.seq, chain.hash
        lines: list[bytes] = []
        size = done = 0
        is_full = False
        for entry in entries:
            lines.append(chain.append(entry.fields, self._boot_id, entry.time_ns))
            size += len(lines[-1])
            done += 1
            if self._file.end + size >= self._max_bytes:
                lines.append(chain.append({"event": ROTATE}, self._boot_id, time.time_ns()))
                is_full = True
                break
            if size >= _BATCH_BYTES:
                break
        data = b"".join(lines)
        try:
            self._file.append(data)
        except OSError:
            chain.seq, chain.hash = seq, last_hash
            raise
        self._checkpoints.add(data, len(lines))
        self.head = chain.seq
        self._is_full = is_full
        return done

    def sync(self) -> None:
        """Wait until all records are on disk.

        Raises:
            OSError: they may not be.
        """
        self._file.sync()

    def checkpoint(self) -> None:
        """Sign how far the log has come, if there is anything new.

        Raises:
            OSError: the records are not on disk, or the checkpoint is not.
        """
        if self._checkpoints.pending:
            self._file.sync()
            self._checkpoints.write(self._chain.seq, self._chain.hash, time.time_ns())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _begin_next(self) -> None:
        self._file.sync()
        if self._unlisted is None:
            closed = closed_files(self._path)
            target = closed_name(self._path, closed[-1][0] + 1 if closed else 1)
            os.rename(self._path, target)
            self._unlisted = ClosedFile(target.name, self._first_seq, self._chain.seq, self._chain.hash, self._file.end)
        self._open_next()
        self._is_full = False

    def _replace_lost(self) -> None:
        """The records in the lost file are gone unless somebody has it; the chain shows that they are missing."""
        self._open_next()
        self.note("log.reopened", reason="something else moved or deleted the file")

    def _open_next(self) -> None:
        """Raises OSError if the path leads to something that is not empty."""
        following = AppendFile(self._path, keep_unsynced=self._keep_unsynced, empty=True)
        try:
            sync_folder(self._path.parent)
        except OSError:
            following.close()
            raise
        self._file.close()
        self._file = following
        self._first_seq = self._chain.seq + 1


def lock(log: Path) -> int:
    """Make this process the only writer of a log. Returns a descriptor, the lock lasts until it is closed.

    Raises:
        BlockingIOError: another process is.
        OSError: the lock file cannot be written.
    """
    descriptor = os.open(log.with_name(log.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows only
            except OSError as error:
                raise BlockingIOError(errno.EAGAIN, "locked", str(log)) from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
