"""The SQLite file of the access store: how it is opened, brought up to date, and noticed when it goes away."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from inferflux_core.access import store_schema
from inferflux_core.errors import ConfigError
from inferflux_core.private_files import check_private, make_private_folder

WHAT = "the access store"


def prepare(path: Path, timeout_s: float) -> None:
    """Make the file if there is none (mode 0600), and bring its tables up to date.

    Any number of processes may do this at one time. A process that dies within leaves the file as it was.

    Raises:
        ConfigError: names the file: it is corrupt, locked, made by a newer InferFlux, or others may read it.
    """
    make_private_folder(path.parent)
    try:
        # Only ever made here, and closed before SQLite opens it: closing any descriptor of a file drops SQLite's locks on it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{WHAT} {str(path)!r} cannot be made: {error.strerror}; name another file") from error
    try:
        check_private(path, WHAT)
        with closing(connect(path, timeout_s)) as connection:
            _use_wal(connection, timeout_s)
            _migrate(connection, path)
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise sqlite3.DatabaseError(problem)
    except OSError as error:
        raise ConfigError(f"{WHAT} {str(path)!r} cannot be read: {error.strerror}; correct the path or the file") from error
    except sqlite3.DatabaseError as error:
        if is_locked(error):
            raise ConfigError(
                f"{WHAT} {str(path)!r} is locked by another program; end that one, or wait until it is done"
            ) from error
        raise ConfigError(f"{WHAT} {str(path)!r} cannot be used: {error}; restore it from a backup, or move it away") from error


def connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    """A connection to an existing file, without implicit transactions, that waits up to `timeout_s` for locks.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=rw",
        uri=True,
        timeout=timeout_s,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        # FULL, not NORMAL: a revocation must outlive a power cut, and administrators write rarely.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another connection stands in the way for now."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _use_wal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """SQLite does not wait for locks while it changes the journal mode, and several servers may start at one time."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if not is_locked(error) or time.monotonic() >= end:
                raise
            time.sleep(0.01)
        else:
            return


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        latest = len(store_schema.MIGRATIONS)
        if version > latest:
            raise ConfigError(
                f"{WHAT} {str(path)!r} was made by a newer InferFlux (its version is {version}, this one knows {latest}); "
                f"update InferFlux, or name another file"
            )
        for migration in store_schema.MIGRATIONS[version:]:
            for statement in migration:
                connection.execute(statement)
        if version < latest:
            connection.execute(f"PRAGMA user_version={latest:d}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class StoreConnection:
    """A connection that notices when its file is deleted or replaced: SQLite itself would go on with the deleted one, and
    so with keys that were revoked in the one that took its place."""

    __slots__ = ("_connection", "_identity", "_path", "_timeout_s")

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._connection: sqlite3.Connection | None = None
        self._identity = (-1, -1)

    def get(self) -> sqlite3.Connection:
        """The connection to the file that is there now.

        Raises:
            OSError: there is none.
            sqlite3.Error: it cannot be opened, or has not the tables of this version.
            ConfigError: others may read it.
        """
        status = os.stat(self._path)
        identity = (status.st_dev, status.st_ino)
        if self._connection is None or identity != self._identity:
            self.close()
            check_private(self._path, WHAT)
            connection = connect(self._path, self._timeout_s)
            try:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version != len(store_schema.MIGRATIONS):
                    raise sqlite3.DatabaseError("another version of the tables")
            except BaseException:
                connection.close()
                raise
            self._connection, self._identity = connection, identity
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
