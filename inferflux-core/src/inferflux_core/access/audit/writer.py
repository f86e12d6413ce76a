"""The thread that writes the log.

Everything that is waiting goes to disk in one write, with `fsync: each` followed by one sync: group commit. While the disk
fails, the records wait here and are tried again, and when it works again the log says for how long it did not.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from inferflux_core.access.audit.chained_log import ChainedLog, Entry
from inferflux_core.settings import AuditSettings

logger = logging.getLogger("inferflux.audit")

SYNC_INTERVAL_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_CHECKPOINT_AGAIN_S = 5.0
_BATCH = 1000  # entries taken from the queue at a time


class Writer:
    """Owns an open log until it is closed.

    Attributes:
        written: ticket of the last entry that is in the log; with `fsync: each`, on disk.
        healthy: whether the last attempt to write went well.
    """

    def __init__(
        self,
        log: ChainedLog,
        settings: AuditSettings,
        on_count: Callable[[str], None],
        on_progress: Callable[[], None],
    ) -> None:
        """Args:
        on_progress: called in this thread when records were written, or could not be.
        """
        self._log = log
        self._settings = settings
        self._on_count = on_count
        self._on_progress = on_progress
        self._incoming: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._pending: deque[Entry] = deque()
        self._closing = threading.Event()
        self._give_up_at = 0.0
        self._sync_at: float | None = None
        self._checkpoint_at: float | None = None
        self._unsigned = 0  # records since the last checkpoint
        self._ticket = 0  # of the last entry appended
        self._failures = 0
        self._failing_since = 0.0
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="inferflux-audit", daemon=True)
        self.written = 0
        self.healthy = True
        self._drop_lock = threading.Lock()
        self._dropped = 0  # since the log last mentioned it

    @property
    def head(self) -> int:
        """Number of the last record."""
        return self._log.head

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Hand over an entry; from any thread, never waits."""
        self._incoming.put(entry)

    def drop(self) -> None:
        """Count a record that is not taken; the next record says how many were not. From any thread, never waits."""
        with self._drop_lock:
            self._dropped += 1
            first = self._dropped == 1
        if first:
            self._incoming.put(None)  # the thread may be idle by now
        self._on_count("dropped")

    def close(self, patience_s: float) -> None:
        """Write what is left, then end; blocks. A disk that fails has `patience_s` seconds to come back."""
        self._give_up_at = time.monotonic() + patience_s
        self._closing.set()
        self._incoming.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._has_work() or not self._closing.is_set():
            self._collect()
            try:
                self._commit()
            except OSError as error:
                self._failed(error)
                if self._closing.is_set() and time.monotonic() >= self._give_up_at:
                    self._abandon()
                    break
        with contextlib.suppress(OSError):  # what was given up; a failure before has been reported
            self._log.sync()
        self._checkpoint()
        self._log.close()

    def _has_work(self) -> bool:
        return bool(
            self._pending
            or self._log.own_entries
            or self._dropped
            or not self.healthy
            or self._sync_at is not None
            or not self._incoming.empty()
        )

    def _collect(self) -> None:
        """Wait for something to do, and take what there is."""
        if not self.healthy:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
            if self._closing.wait(pause):
                time.sleep(_FIRST_PAUSE_S)  # that event stays set and pauses nothing any more
        elif not (self._pending or self._log.own_entries or self._closing.is_set()):
            due = [at for at in (self._sync_at, self._checkpoint_at) if at is not None]
            with contextlib.suppress(queue.Empty):
                self._take(self._incoming.get(timeout=max(0.0, min(due) - time.monotonic()) if due else None))
        while len(self._pending) < _BATCH:
            try:
                self._take(self._incoming.get_nowait())
            except queue.Empty:
                break

    def _take(self, entry: Entry | None) -> None:
        if entry is not None:  # None only wakes
            self._pending.append(entry)

    def _commit(self) -> None:
        """Write what is waiting, and do what is due.

        Raises:
            OSError: something failed, and is to be tried again.
        """
        each = self._settings.fsync == "each"
        self._log.prepare()
        if not self._log.own_entries:  # while the disk fails, one such record is enough
            self._note_dropped()
        while self._log.own_entries or self._pending:
            if own := self._log.own_entries:
                done = self._log.append(own)
                del own[:done]
            else:
                done = self._log.append(self._pending)
                for _ in range(done):
                    self._ticket = self._pending.popleft().ticket
            self._count(done)
            self._log.prepare()  # it may be full
        now = time.monotonic()
        if each or not self.healthy or (self._sync_at is not None and now >= self._sync_at) or self._closing.is_set():
            self._log.sync()
            self._sync_at = None
        if not self.healthy:
            self._recovered()
        if self.written != self._ticket:
            self.written = self._ticket
            self._on_progress()
        if self._checkpoint_at is not None and (
            now >= self._checkpoint_at or self._unsigned >= self._settings.checkpoint_records
        ):
            self._checkpoint()

    def _note_dropped(self) -> None:
        with self._drop_lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._log.note("log.dropped", records=dropped)

    def _count(self, records: int) -> None:
        now = time.monotonic()
        for _ in range(records):
            self._on_count("records")
        self._unsigned += records
        if self._checkpoint_at is None:
            self._checkpoint_at = now + self._settings.checkpoint_interval_s
        if self._sync_at is None and self._settings.fsync == "interval":
            self._sync_at = now + SYNC_INTERVAL_S

    def _checkpoint(self) -> None:
        """A checkpoint that fails stops nothing; the next one covers the same records."""
        try:
            self._log.checkpoint()
        except OSError as error:
            self._on_count("write_failures")
            logger.warning("no checkpoint of the audit log could be written: %s", error.strerror or error)
            self._checkpoint_at = time.monotonic() + min(self._settings.checkpoint_interval_s, _CHECKPOINT_AGAIN_S)
        else:
            self._checkpoint_at = None
        self._unsigned = 0

    def _failed(self, error: OSError) -> None:
        self._on_count("write_failures")
        if self.healthy:
            self._failing_since = time.monotonic()
            self._failures = 0
            logger.error("the audit log cannot be written (%s); records wait in memory until it can", error.strerror or error)
        self._failures += 1
        self._failure = errno.errorcode.get(error.errno or 0, "unknown")
        self.healthy = False
        self._on_progress()

    def _recovered(self) -> None:
        self.healthy = True
        milliseconds = int((time.monotonic() - self._failing_since) * 1000)
        self._log.note("log.resumed", error=self._failure, failures=self._failures, failed_for_ms=milliseconds)
        logger.warning("the audit log can be written again after %d ms", milliseconds)

    def _abandon(self) -> None:
        lost = len(self._pending)
        with contextlib.suppress(queue.Empty):
            while True:
                lost += self._incoming.get_nowait() is not None
        for _ in range(lost):
            self._on_count("dropped")
        logger.error("the audit log could not be written to the end: %d records are lost", lost)
