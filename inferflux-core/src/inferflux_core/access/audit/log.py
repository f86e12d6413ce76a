"""AuditLog: where the server puts what happened. NoAudit stands for it where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from inferflux_core.access.audit.chained_log import ChainedLog, Entry, lock
from inferflux_core.access.audit.checkpoints import CheckpointWriter, last_checkpoint
from inferflux_core.access.audit.content import kept_content
from inferflux_core.access.audit.events import AuditEvent, Json, record_fields
from inferflux_core.access.audit.key_files import AuditPaths, create_checkpoint_key, create_key
from inferflux_core.access.audit.recovery import complete_manifest, find_end
from inferflux_core.access.audit.trail import AuditTrail
from inferflux_core.access.audit.writer import Writer
from inferflux_core.errors import AccessUnavailableError, ConfigError
from inferflux_core.settings import AuditSettings

_PATIENCE_S = 5.0  # for a disk that fails while the server stops


class AuditLog(AuditTrail):
    """The audit log of a server: events go in here, a thread writes them."""

    enabled = True

    def __init__(self, settings: AuditSettings, state_dir: Path, on_count: Callable[[str], None]) -> None:
        """Args:
        on_count: called with `records`, `write_failures` or `dropped` to add 1; from any thread.
        """
        self._settings = settings
        self._paths = AuditPaths.of(settings, state_dir)
        self._on_count = on_count
        self._put_lock = threading.Lock()
        self._put = 0
        self._room: deque[asyncio.Future[None]] = deque()
        self._on_disk: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._writer: Writer | None = None
        self._lock_fd: int | None = None
        self._key = b""
        self._closed = False

    async def start(self) -> None:
        """Open the log, put right what a crash left, and start to write.

        Raises:
            ConfigError: it cannot be written, another process writes it, or it was changed or cut since the last stop.
        """
        self._loop = asyncio.get_running_loop()
        self._writer = await asyncio.to_thread(self._open)
        self._writer.start()

    async def close(self, last: AuditEvent | None = None) -> None:
        """Write everything that was recorded, then `last` as the log's last record, and end. May be called again.

        Waits at most some seconds for a disk that fails; what is lost then is counted as dropped.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        if last is not None:
            self._enqueue(writer, last)
        self._closed = True
        self._release_room()
        try:
            await asyncio.to_thread(writer.close, _PATIENCE_S)
        finally:
            self._release_room()
            for _, future in self._on_disk:
                if not future.done():
                    future.set_result(None)
            self._on_disk.clear()
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    async def record(self, event: AuditEvent, *, important: bool = False) -> None:
        """Record an event. With `fsync: each` it returns when the record is on disk.

        A cancelled call records the event all the same.

        Args:
            important: never dropped or refused, whatever `on_full` says; for what administrators do and failed
                authentication.

        Raises:
            AccessUnavailableError: it was not taken, since the log is not open; or, with `fsync: each` and `required`, the disk
                fails, and it waits in memory still.
            ValueError, TypeError: see `record_fields`.
        """
        writer = self._open_writer()
        fields, now = record_fields(event), time.time_ns()
        if not important and not self._takes(writer):
            writer.drop()
            return
        if important or self._settings.on_full == "block":
            try:
                await self._wait_for_room(writer)
            except asyncio.CancelledError:
                if not self._closed:
                    self._hand_over(writer, fields, now)
                raise
        if self._closed:
            self._on_count("dropped")
            raise _unavailable()
        ticket = self._hand_over(writer, fields, now)
        if self._settings.fsync == "each":
            await self._wait_for_disk(writer, ticket)
            if self._settings.required and writer.written < ticket:
                raise _unavailable()

    def record_soon(self, event: AuditEvent) -> None:
        """Record an event from code that cannot wait, in any thread. It is taken even when the queue is full; a log that is not
        open counts it as dropped."""
        writer = self._writer
        if writer is None:
            self._on_count("dropped")
            return
        self._enqueue(writer, event)

    def check(self) -> None:
        """Whether a new request may be begun.

        Raises:
            AccessUnavailableError: `audit_unavailable`: the log is required and cannot be written, or its queue is full and
                requests are to be refused then.
        """
        writer = self._writer
        if self._settings.required and (writer is None or not writer.healthy):
            raise _unavailable()
        if writer is not None and self._settings.on_full == "reject" and self._is_full(writer):
            raise _unavailable()

    @property
    def healthy(self) -> bool:
        """Whether records reach the disk, as far as is known."""
        return self._writer is not None and self._writer.healthy

    @property
    def head(self) -> int:
        """Number of the last record in the log; 0 for none, and while the log is not open."""
        return 0 if self._writer is None else self._writer.head

    @property
    def keeps_content(self) -> bool:
        """Whether `content` keeps anything."""
        return self._settings.content != "none"

    def content(self, text: str) -> dict[str, Json]:
        """What is kept of a prompt, to be put among the fields of its event."""
        return kept_content(self._settings.content, text, self._key) if self._key else {}

    def _open(self) -> Writer:
        paths, settings = self._paths, self._settings
        try:
            paths.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                self._lock_fd = lock(paths.log)
            except BlockingIOError:
                raise ConfigError(
                    f"another process writes the audit log {str(paths.log)!r}; stop it, or give this server a state_dir or "
                    f"audit.file of its own"
                ) from None
            try:
                log = self._open_log()
            except BaseException:
                os.close(self._lock_fd)
                self._lock_fd = None
                raise
        except OSError as error:
            raise ConfigError(
                f"the audit log {str(paths.log)!r} cannot be opened for writing: {error.strerror}; "
                f"set audit.file to one that can"
            ) from error
        return Writer(log, settings, self._on_count, self._writer_progressed)

    def _open_log(self) -> ChainedLog:
        paths, settings = self._paths, self._settings
        if paths.log.exists() and not paths.log.is_file():
            raise ConfigError(f"the audit log {str(paths.log)!r} is not a regular file; set audit.file to one")
        if not paths.key.exists() and paths.log.exists() and paths.log.stat().st_size:
            raise ConfigError(
                f"the audit log {str(paths.log)!r} has records, but its key {str(paths.key)!r} is missing; restore the key, or "
                f"move the log and its checkpoints away to begin a new one"
            )
        self._key = create_key(paths.key)
        checkpoint_key = create_checkpoint_key(paths.checkpoint_key, paths.public_key)
        self._check_checkpoints(paths)
        end = find_end(paths.log, self._key)
        complete_manifest(paths.log, self._key)
        newest = last_checkpoint(paths.checkpoints, checkpoint_key.public_key())
        if newest is not None and (newest.seq > end.seq or (newest.seq == end.seq and newest.hash != end.hash)):
            raise ConfigError(
                f"the audit log {str(paths.log)!r} ends with record {end.seq}, but a checkpoint says that it had {newest.seq}: "
                f"it was cut off or replaced. Keep log and checkpoints as evidence, and move both away to begin a new log."
            )
        boot_id = secrets.token_hex(16)
        return ChainedLog(
            paths.log,
            self._key,
            boot_id,
            end,
            CheckpointWriter(paths.checkpoints, checkpoint_key, boot_id),
            max_bytes=settings.max_file_bytes,
            keep_unsynced=settings.fsync != "never",
        )

    @staticmethod
    def _check_checkpoints(paths: AuditPaths) -> None:
        if paths.checkpoints.resolve() == paths.log.resolve():
            raise ConfigError(f"audit.checkpoint_file: {str(paths.checkpoints)!r} is the audit log itself; name another file")
        try:
            os.close(os.open(paths.checkpoints, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"audit.checkpoint_file: {str(paths.checkpoints)!r} cannot be opened for writing: {error.strerror}"
            ) from error

    def _open_writer(self) -> Writer:
        if self._writer is None:
            self._on_count("dropped")
            raise _unavailable()
        return self._writer

    def _takes(self, writer: Writer) -> bool:
        """Whether there is room for a record of no importance, or it is to wait for some.

        Where requests are refused while the queue is full, those admitted before still have their records taken, and those of
        the refused ones too, up to as many again: a flood cannot fill the memory.
        """
        waiting, size = self._put - writer.written, self._settings.queue_size
        match self._settings.on_full:
            case "block":
                return True
            case "drop":
                return waiting < size
            case "reject":
                return waiting < 2 * size

    async def _wait_for_room(self, writer: Writer) -> None:
        while self._is_full(writer) and not self._closed:
            future: asyncio.Future[None] = self._loop.create_future()
            self._room.append(future)
            # Looked at again: the writer may have made room before it could see who waits.
            if self._is_full(writer) and not self._closed:
                await future

    async def _wait_for_disk(self, writer: Writer, ticket: int) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._on_disk.append((ticket, future))
        if writer.healthy and writer.written < ticket:
            await future

    def _is_full(self, writer: Writer) -> bool:
        return self._put - writer.written >= self._settings.queue_size

    def _enqueue(self, writer: Writer, event: AuditEvent) -> None:
        self._hand_over(writer, record_fields(event), time.time_ns())

    def _hand_over(self, writer: Writer, fields: dict[str, Json], time_ns: int) -> int:
        with self._put_lock:  # tickets in the order of the queue, though threads may come at once
            self._put += 1
            writer.put(Entry(fields, time_ns, self._put))
            return self._put

    def _writer_progressed(self) -> None:
        if self._room or self._on_disk:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everybody who waits
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        writer = self._writer
        if writer is None:
            return
        # While the disk fails nobody is kept waiting for it: `record` says what that means.
        while self._on_disk and (self._on_disk[0][0] <= writer.written or not writer.healthy):
            _, future = self._on_disk.popleft()
            if not future.done():
                future.set_result(None)
        if not self._is_full(writer):
            self._release_room()

    def _release_room(self) -> None:
        while self._room:
            future = self._room.popleft()
            if not future.done():
                future.set_result(None)


class NoAudit(AuditTrail):
    """No audit log: takes everything and keeps nothing."""

    enabled = False
    healthy = True
    head = 0
    keeps_content = False

    async def start(self) -> None:
        """Nothing."""

    async def close(self, last: AuditEvent | None = None) -> None:
        """Nothing."""

    async def record(self, event: AuditEvent, *, important: bool = False) -> None:
        """Nothing."""

    def record_soon(self, event: AuditEvent) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""

    def content(self, text: str) -> dict[str, Json]:
        """Nothing."""
        return {}


def _unavailable() -> AccessUnavailableError:
    return AccessUnavailableError("The audit log cannot be written. Try again later.", code="audit_unavailable")
