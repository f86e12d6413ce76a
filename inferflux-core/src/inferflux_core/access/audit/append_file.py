"""A file that is only appended to, in which nothing half-written stays.

A write may fail in the middle (disk full), and what was written may fail to reach the disk. In both cases the file is cut
back to where it was whole. After a failed `fdatasync` the system may have forgotten what it could not write, so that trying
again would succeed and mean nothing: the bytes since the last success are kept here and written again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

# looked up here, so that tests can stand in for a failing disk
_write = os.write
_sync = getattr(os, "fdatasync", os.fsync)


class AppendFile:
    """An open file.

    Attributes:
        end: length in bytes of what was appended as a whole.
        synced_end: length of what is known to be on disk.
    """

    def __init__(self, path: Path, *, keep_unsynced: bool, empty: bool = False) -> None:
        """Open the file, created if it does not exist, readable by this user only.

        Args:
            keep_unsynced: keep what is not on disk yet in memory, to write it again after a failed `sync`.
            empty: refuse a file that has anything in it.

        Raises:
            OSError: it cannot be opened, is not a regular file, or has something in it.
        """
        self.path = path
        self._keep_unsynced = keep_unsynced
        self._unsynced = bytearray()
        self._torn = False
        self._forgotten = False
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file", str(path))
            if empty and found.st_size:
                raise OSError(errno.EEXIST, "another file has taken its place", str(path))
        except OSError:
            os.close(self._fd)
            raise
        self._identity = (found.st_dev, found.st_ino)
        self.end = self.synced_end = found.st_size

    def append(self, data: bytes) -> None:
        """Add bytes, all or none.

        Raises:
            OSError: nothing was added.
        """
        self.repair()
        self._write_all(data)
        self.end += len(data)
        if self._keep_unsynced:
            self._unsynced += data

    def sync(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: it may not be.
        """
        self.repair()
        if self.synced_end == self.end:
            return
        try:
            _sync(self._fd)
        except OSError:
            self._forgotten = self._keep_unsynced
            raise
        self._synced()

    def repair(self) -> None:
        """Put right what failed before.

        Raises:
            OSError: it fails still.
        """
        if self._forgotten:
            self._torn = True
            os.ftruncate(self._fd, self.synced_end)
            self._write_all(bytes(self._unsynced), cut_to=self.synced_end)
            _sync(self._fd)
            self._synced()
        elif self._torn:
            os.ftruncate(self._fd, self.end)
        self._torn = self._forgotten = False

    def truncate(self, end: int) -> None:
        """Cut the file; for what a crash left behind."""
        os.ftruncate(self._fd, end)
        self.end = self.synced_end = end

    def is_in_place(self) -> bool:
        """Whether its path still leads to it, or somebody moved or deleted it."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_all(self, data: bytes, cut_to: int | None = None) -> None:
        rest = memoryview(data)
        try:
            while rest:
                written = _write(self._fd, rest)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                rest = rest[written:]
        except OSError:
            self._torn = True
            if cut_to is None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self.end)
                    self._torn = False
            raise

    def _synced(self) -> None:
        self.synced_end = self.end
        self._unsynced.clear()
