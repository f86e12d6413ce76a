"""A disk that fails under the audit log: degraded, nothing half-written, and whole again afterwards."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core.access.audit.audit_logs import Counted, check, open_log, records, things, write_log
from inferflux_core.access.audit import append_file, chained_log, checkpoints, rotation, writer
from inferflux_core.access.audit.append_file import AppendFile
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.log import AuditLog
from inferflux_core.errors import AccessUnavailableError
from inferflux_core.settings import AuditSettings


class FailingDisk:
    """Stands in for the system calls of the log's file. While `error` is set, writes take `room` bytes and then fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.sync_error: int | None = None
        self.room = 0
        self.synced = 0
        self.failed = threading.Event()
        self.write = append_file._write
        self.sync = append_file._sync
        monkeypatch.setattr(append_file, "_write", self._write)
        monkeypatch.setattr(append_file, "_sync", self._sync)
        monkeypatch.setattr(writer, "_FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(writer, "_LONGEST_PAUSE_S", 0.01)

    def _write(self, descriptor: int, data: memoryview) -> int:
        if self.error is None:
            return self.write(descriptor, data)
        if self.room:
            written = self.write(descriptor, data[: self.room])
            self.room = 0
            return written
        self.failed.set()
        raise OSError(self.error, os.strerror(self.error))

    def _sync(self, descriptor: int) -> None:
        if self.sync_error is not None:
            # What the system could not write it forgets: the data is gone and the next sync succeeds.
            os.ftruncate(descriptor, self.room)
            self.failed.set()
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        self.sync(descriptor)
        self.synced += 1

    async def has_failed(self) -> None:
        assert await asyncio.to_thread(self.failed.wait, 10)
        self.failed.clear()
        assert await asyncio.to_thread(self.failed.wait, 10)  # tried again, so that the first failure is known to all


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # the writer thread reports to nobody
            await asyncio.sleep(0.002)


def thing(number: int) -> AuditEvent:
    return AuditEvent(event="thing", fields={"n": number})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("fsync", ["never", "interval", "each"])
async def test_a_disk_that_fails_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fsync: str) -> None:
    disk = FailingDisk(monkeypatch)
    async with open_log(tmp_path, counts := Counted(), fsync=fsync, required=True) as log:
        await log.record(thing(0))
        await until(lambda: log.head == 1)
        whole = (tmp_path / "audit.jsonl").read_bytes()
        disk.error, disk.room = code, 50
        if fsync == "each":
            with pytest.raises(AccessUnavailableError):  # it is promised to be on disk, and is not yet
                await log.record(thing(1))
        else:
            await log.record(thing(1))
        await disk.has_failed()
        assert not log.healthy
        with pytest.raises(AccessUnavailableError) as refused:
            log.check()
        assert refused.value.code == "audit_unavailable"
        assert (tmp_path / "audit.jsonl").read_bytes() == whole  # the 50 bytes were taken back
        log.record_soon(thing(2))
        disk.error = None
        await until(lambda: log.healthy and log.head == 4)
        log.check()
        await log.record(thing(3))
    assert things(tmp_path) == [0, 1, 2, 3]
    (resumed,) = (record for record in records(tmp_path) if record["event"] == "log.resumed")
    assert resumed["error"] == errno.errorcode[code]
    assert resumed["failures"] == counts["write_failures"] >= 2
    assert counts["records"] == 5
    assert check(tmp_path).ok


async def test_without_being_required_nobody_waits_for_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch)
    async with open_log(tmp_path, fsync="each") as log:
        disk.error = errno.ENOSPC
        await log.record(thing(0))
        await log.record(thing(1))
        log.check()
        assert (log.healthy, log.head) == (False, 0)
        disk.error = None
    assert things(tmp_path) == [0, 1]
    assert check(tmp_path).ok


async def test_the_log_says_how_many_records_were_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch)
    async with open_log(tmp_path, on_full="drop", queue_size=1) as log:
        disk.error = errno.ENOSPC
        for number in range(4):
            await log.record(thing(number))
        await disk.has_failed()
        disk.error = None
    assert things(tmp_path) == [0]
    found = records(tmp_path)
    assert sum(record["records"] for record in found if record["event"] == "log.dropped") == 3
    assert [record["event"] for record in found].count("log.resumed") == 1


@pytest.mark.parametrize("fsync", ["interval", "each"])
async def test_what_a_failed_sync_forgot_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: str) -> None:
    disk = FailingDisk(monkeypatch)
    async with open_log(tmp_path, fsync=fsync) as log:
        await log.record(thing(0))
        await until(lambda: log.head == 1)
        await until(lambda: disk.synced > 0)
        disk.room = (tmp_path / "audit.jsonl").stat().st_size
        disk.sync_error = errno.EIO
        await log.record(thing(1))
        await until(lambda: not log.healthy)
        assert things(tmp_path) == [0]  # the disk has forgotten the other
        disk.sync_error = None
        await until(lambda: log.healthy)
    assert things(tmp_path) == [0, 1]
    assert check(tmp_path).ok


async def test_a_disk_that_fails_to_the_end_does_not_keep_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch)
    monkeypatch.setattr("inferflux_core.access.audit.log._PATIENCE_S", 0.05)
    log = AuditLog(AuditSettings(), tmp_path, counts := Counted())
    await log.start()
    disk.error = errno.EIO
    for number in range(3):
        await log.record(thing(number))
    await log.close(AuditEvent(event="server.stop"))
    assert counts["dropped"] == 4
    assert (tmp_path / "audit.jsonl").read_bytes() == b""
    disk.error = None
    await write_log(tmp_path, 1)
    assert check(tmp_path).records == 1


FILE_SIZE_LIMIT = """
import asyncio, resource, sys
from pathlib import Path
from core.access.audit.audit_logs import open_log, Counted
from inferflux_core.access.audit.events import AuditEvent

async def main():
    async with open_log(Path(sys.argv[1]), counts := Counted(), fsync=sys.argv[2], required=True) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        for number in range(20):
            log.record_soon(AuditEvent(event="thing", fields={"n": number}))
        while log.healthy:
            await asyncio.sleep(0.002)
        try:
            log.check()
        except Exception as error:
            print(error.code, counts["write_failures"] > 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while not log.healthy:
            await asyncio.sleep(0.002)
        log.check()
asyncio.run(main())
"""


@pytest.mark.parametrize("fsync", ["never", "each"])
def test_a_real_limit_of_the_file_size(tmp_path: Path, fsync: str) -> None:
    """The kernel cuts the write in the middle of a record."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    tests = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", FILE_SIZE_LIMIT, str(tmp_path), fsync],
        env={**os.environ, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, "audit_unavailable True\n"), done.stderr
    assert things(tmp_path) == list(range(20))
    assert check(tmp_path).ok


def test_a_write_that_cannot_even_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch)
    file = AppendFile(tmp_path / "f", keep_unsynced=True)
    file.append(b"whole\n")
    disk.error, disk.room = errno.EIO, 2
    with pytest.raises(OSError, match="Input/output"):
        file.append(b"first\n")
    assert (tmp_path / "f").read_bytes() == b"whole\n"  # taken back at once
    disk.room = 2
    with monkeypatch.context() as patch:
        patch.setattr(append_file.os, "ftruncate", _fails)
        with pytest.raises(OSError, match="Input/output"):
            file.append(b"second\n")
        assert (tmp_path / "f").read_bytes() == b"whole\nse"
        disk.error = None
        with pytest.raises(OSError, match="Input/output"):
            file.append(b"second\n")
    file.append(b"second\n")
    file.sync()
    assert (tmp_path / "f").read_bytes() == b"whole\nsecond\n"
    assert file.end == file.synced_end == 13
    file.close()


def _fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_a_file_that_was_taken_away_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chained_log, "_LOOK_INTERVAL_S", 0.0)
    async with open_log(tmp_path, fsync="each") as log:
        await log.record(thing(0))
        (tmp_path / "audit.jsonl").rename(tmp_path / "moved")
        await log.record(thing(1))
    assert [record["event"] for record in records(tmp_path)] == ["log.reopened", "thing"]
    found = check(tmp_path)
    assert (found.ok, found.first_bad) == (False, 1)
    (tmp_path / "moved").rename(tmp_path / "audit.000001.jsonl")
    found = check(tmp_path)
    assert (found.ok, found.first_bad) == (False, 2)  # all records are there, but it was not the log that closed the file
    assert "does not end with 'log.rotate'" in str(found.reason)


async def test_a_file_in_its_place_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chained_log, "_LOOK_INTERVAL_S", 0.0)
    FailingDisk(monkeypatch)
    path = tmp_path / "audit.jsonl"
    async with open_log(tmp_path, fsync="each") as log:
        await log.record(thing(0))
        path.unlink()
        path.write_text("other\n")
        await log.record(thing(1))
        assert not log.healthy
        assert path.read_text() == "other\n"
        path.unlink()
        await until(lambda: log.healthy)
    assert [record["event"] for record in records(tmp_path)] == ["log.reopened", "thing", "log.resumed"]


async def test_checkpoints_that_cannot_be_written_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHECKPOINT_AGAIN_S", 0.0)
    with monkeypatch.context() as patch:
        async with open_log(tmp_path, counts := Counted(), checkpoint_records=1, fsync="each") as log:
            patch.setattr(checkpoints.os, "fsync", _fails)
            await log.record(thing(0))
            await until(lambda: counts["write_failures"] > 0)
            assert log.healthy
            patch.undo()
            await log.record(thing(1))
    found = check(tmp_path)
    assert (found.ok, found.signed_to) == (True, 2)


@pytest.mark.parametrize("step", ["rename", "add_to_manifest", "sync_folder"])
async def test_a_rotation_that_fails_halfway_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    disk = FailingDisk(monkeypatch)
    async with open_log(tmp_path, fsync="each", max_file_bytes=4096) as log:
        await log.record(thing(0))
        with monkeypatch.context() as patch:

            def fails(*_: object) -> None:
                disk.failed.set()
                _fails()

            patch.setattr(os if step == "rename" else chained_log, step, fails)
            for number in range(1, 20):
                await log.record(thing(number))
            await disk.has_failed()
        await until(lambda: log.healthy)
    assert things(tmp_path) == list(range(20))
    assert next(rotation.read_manifest(tmp_path / "audit.jsonl", None)).file == "audit.000001.jsonl"
    assert check(tmp_path).ok
