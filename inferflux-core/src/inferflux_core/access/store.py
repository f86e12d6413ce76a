"""The access store: what administrators set while servers run, in one SQLite file that all processes of a machine share.

Reads are made where they are asked for: they take microseconds, and in WAL mode no writer makes them wait. Writes, which wait
for locks and for the disk, are made by one thread. Whatever goes wrong is `AccessUnavailableError`: nobody is let in on a
guess.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from inferflux_core.access.store_file import StoreConnection, prepare
from inferflux_core.errors import AccessUnavailableError, ConfigError, PreconditionFailedError

logger = logging.getLogger("inferflux.access")

_READ_TIMEOUT_S = 0.02  # of the event loop's time
_LOG_INTERVAL_S = 10.0

T = TypeVar("T")


DEFAULT_STORE = "access.db"
"""Name of the store in the state folder."""


@dataclass(frozen=True, slots=True)
class Document:
    """A named JSON object. The version is 1 when it is first put and grows by one with each put."""

    value: dict[str, Any]
    version: int


class AccessStore:
    """One open file; any number of processes may have it open. `close` ends its thread.

    Args:
        write_timeout_s: how long a write waits for those of other processes.

    Raises:
        ConfigError: the file cannot be used; the message names it, the cause and the cure.
    """

    def __init__(self, path: Path, *, write_timeout_s: float = 5.0) -> None:
        self.path = path
        prepare(path, write_timeout_s)
        self._reader = StoreConnection(path, _READ_TIMEOUT_S)
        self._reading = threading.Lock()
        self._writer = StoreConnection(path, write_timeout_s)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inferflux-access-store")
        self._closed = False
        self._next_log = 0.0

    async def get_document(self, name: str) -> Document | None:
        """The current version; None if it was never put.

        Raises:
            AccessUnavailableError: it cannot be read now.
        """
        rows = self.read("SELECT value, version FROM documents WHERE name = ?", (name,))
        return None if not rows else Document(self.decoded(json.loads, rows[0][0]), rows[0][1])

    async def put_document(self, name: str, value: dict[str, Any], expected_version: int | None) -> Document:
        """Replace a document as a whole.

        Args:
            expected_version: the version it must have now, 0 if it must not exist yet; None takes any.

        Raises:
            PreconditionFailedError: it has another version; nothing is changed.
            AccessUnavailableError: it cannot be written now.
        """
        text = json.dumps(value, allow_nan=False)

        def put(connection: sqlite3.Connection) -> Document:
            row = connection.execute("SELECT version FROM documents WHERE name = ?", (name,)).fetchone()
            version: int = 0 if row is None else row[0]
            if expected_version is not None and expected_version != version:
                raise PreconditionFailedError(
                    f"{name!r} has version {version}, not {expected_version}: somebody else changed it; read it again"
                )
            connection.execute(
                "INSERT INTO documents (name, value, version) VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value, version = excluded.version",
                (name, text, version + 1),
            )
            return Document(json.loads(text), version + 1)

        return await self.write(put)

    def read(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a short query, made in the calling thread.

        Raises:
            AccessUnavailableError: the file is gone, locked or corrupt.
        """
        try:
            with self._reading:
                if self._closed:
                    raise sqlite3.ProgrammingError("the store is closed")
                return self._reader.get().execute(sql, values).fetchall()
        except (sqlite3.Error, OSError, ConfigError) as error:
            raise self._unavailable(error) from error

    async def query(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """Run a longer read in the writer's thread, out of the event loop's way.

        Raises:
            AccessUnavailableError: as `read`.
        """
        return await asyncio.wrap_future(self._start(self._with_connection, look))

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run `change` within a transaction in the writer's thread; what it raises undoes the transaction and is raised here.

        A caller that is cancelled while it waits does not undo it.

        Raises:
            AccessUnavailableError: the file is gone, locked, full or corrupt; nothing is changed.
        """
        return await asyncio.wrap_future(self.submit(change))

    def submit(self, change: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """The same without waiting. Raises AccessUnavailableError if the store is closed."""
        return self._start(self._transact, change)

    def decoded(self, decode: Callable[..., T], *values: Any) -> T:
        """`decode(*values)` of what was read; whatever it raises means that the file holds something that no one here wrote.

        Raises:
            AccessUnavailableError: it does.
        """
        try:
            return decode(*values)
        except (ValueError, TypeError, KeyError) as error:  # pydantic's and json's errors are ValueErrors
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Finish the writes under way, end the thread, close the file. May be called more than once."""
        self._thread.shutdown(wait=True)
        with self._reading:
            self._closed = True
            self._reader.close()
        self._writer.close()

    def _start(
        self, run: Callable[[Callable[[sqlite3.Connection], T]], T], what: Callable[[sqlite3.Connection], T]
    ) -> Future[T]:
        try:
            return self._thread.submit(run, what)
        except RuntimeError as error:
            raise self._unavailable(error) from error

    def _transact(self, change: Callable[[sqlite3.Connection], T]) -> T:
        def within(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = change(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

        return self._with_connection(within)

    def _with_connection(self, use: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._writer.get()
        except (sqlite3.Error, OSError, ConfigError) as error:
            raise self._unavailable(error) from error
        try:
            return use(connection)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> AccessUnavailableError:
        now = time.monotonic()
        if now >= self._next_log:  # under load every request may fail
            self._next_log = now + _LOG_INTERVAL_S
            cause = getattr(error, "sqlite_errorname", None) or type(error).__name__
            logger.error("the access store cannot be used", extra={"fields": {"path": str(self.path), "cause": cause}})
        return AccessUnavailableError("The key store cannot be used now. Try again; if it stays so, tell the administrator.")
