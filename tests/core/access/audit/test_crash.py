"""What a crash leaves of the audit log: no acknowledged record is lost, a torn line is taken out, rotation is finished."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.access.audit.audit_logs import check, open_log, records, things, write_log
from inferflux_core.access.audit.chain import Chain, read_record
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.recovery import find_end
from inferflux_core.access.audit.rotation import closed_files, manifest_path, read_manifest
from inferflux_core.errors import ConfigError

# Writes records until it is killed, and says on its standard output which ones `record` has returned for.
ENDLESS = """
import asyncio, os, sys
from pathlib import Path
from core.access.audit.audit_logs import open_log
from inferflux_core.access.audit.events import AuditEvent

async def main():
    settings = {"max_file_bytes": 100_000, "checkpoint_records": 50, "queue_size": 100}
    async with open_log(Path(sys.argv[1]), fsync=sys.argv[2], **settings) as log:
        number = 0
        while True:
            await log.record(AuditEvent(event="thing", fields={"n": number}))
            os.write(1, b"%d\\n" % number)
            number += 1
            if number % 10 == 0:
                await asyncio.sleep(0)
asyncio.run(main())
"""


@pytest.mark.parametrize("fsync", ["never", "interval", "each"])
def test_kill_9(tmp_path: Path, fsync: str) -> None:
    """With `each` nothing that was acknowledged is lost; else only what was still in the queue: counted here."""
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tmp_path), fsync],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        acknowledged = -1
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged == 400:
                process.send_signal(signal.SIGKILL)  # it writes on until the signal arrives
        process.stdout.close()
        assert process.wait(10) == -signal.SIGKILL
        assert acknowledged >= 400
        asyncio.run(write_log(tmp_path, 0))  # takes out what is torn
        last = things(tmp_path)[-1]
        if fsync == "each":
            assert last >= acknowledged
        else:
            assert acknowledged - last <= 100  # the size of the queue
    found = check(tmp_path)
    assert found.ok, found.reason
    assert len(things(tmp_path)) > 800 - 2 * 100


async def test_a_torn_line_becomes_a_record(tmp_path: Path) -> None:
    await write_log(tmp_path, 2)
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"boot_id":"00\x1b\n'[:-1])
    found = check(tmp_path)
    assert (found.ok, found.first_bad, found.records) == (False, 3, 2)
    assert "torn" in str(found.reason)
    await write_log(tmp_path, 1)
    recovered = records(tmp_path)[2]
    assert (recovered["event"], recovered["seq"], recovered["torn_bytes"]) == ("log.recovered", 3, 15)
    assert recovered["torn"] == '{"boot_id":"00\x1b'
    assert things(tmp_path) == [0, 1, 0]
    assert check(tmp_path).ok


async def test_a_line_without_its_end_was_not_acknowledged(tmp_path: Path) -> None:
    """All of a record but the newline: it is kept in the record that says so, like any other torn line."""
    await write_log(tmp_path, 1)
    path = tmp_path / "audit.jsonl"
    last = read_record(path.read_bytes())
    line = Chain((tmp_path / "audit.key").read_bytes(), 1, last.hash).append({"event": "thing", "n": 1}, "0" * 32, 0)
    path.write_bytes(path.read_bytes() + line[:-1])
    await write_log(tmp_path, 0)
    assert [record["event"] for record in records(tmp_path)] == ["thing", "log.recovered"]
    assert records(tmp_path)[1]["torn"] == line[:-1].decode()
    assert check(tmp_path).ok


async def test_torn_before_the_first_record(tmp_path: Path) -> None:
    await write_log(tmp_path, 0)
    (tmp_path / "audit.jsonl").write_bytes(b"\x00" * 5000)
    await write_log(tmp_path, 1)
    assert [(record["event"], record["seq"]) for record in records(tmp_path)] == [("log.recovered", 1), ("thing", 2)]
    assert records(tmp_path)[0]["torn_bytes"] == 5000
    assert check(tmp_path).ok


@settings(deadline=None, max_examples=100)
@given(cut=st.integers(min_value=0, max_value=2000), junk=st.binary(max_size=50).filter(lambda data: b"\n" not in data))
def test_any_cut_of_the_last_line_is_repaired_and_nothing_more(
    cut: int, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    key = b"k" * 32
    chain = Chain(key)
    lines = [chain.append({"event": "thing", "n": number}, "0" * 32, number) for number in range(3)]
    whole = b"".join(lines)
    data = whole[: len(whole) - cut] + junk
    (folder / "audit.jsonl").write_bytes(data)
    end = find_end(folder / "audit.jsonl", key)
    # The last newline decides: what is before it are records as they were written, what is after it is torn.
    complete = data.rfind(b"\n") + 1
    assert (end.end, end.torn) == (complete, data[complete:])
    assert end.seq == data[:complete].count(b"\n")


async def test_complete_lines_that_are_wrong_are_no_crash(tmp_path: Path) -> None:
    """Otherwise changing the end of a log and waiting for a restart would make the change good."""
    await write_log(tmp_path, 3)
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b'{"boot_id":"0\n')
    with pytest.raises(ConfigError, match="was changed by something else"):
        await write_log(tmp_path, 1)


async def test_rotation(tmp_path: Path) -> None:
    await write_log(tmp_path, 100, max_file_bytes=4096)
    log = tmp_path / "audit.jsonl"
    closed = closed_files(log)
    assert [number for number, _ in closed] == list(range(1, len(closed) + 1))
    assert len(closed) > 3
    entries = list(read_manifest(log, (tmp_path / "audit.key").read_bytes()))
    assert [entry.file for entry in entries] == [path.name for _, path in closed]
    following = [*(path for _, path in closed[1:]), log]
    for entry, (_, path), after in zip(entries, closed, following, strict=True):
        first, last = (read_record(path.read_bytes().splitlines(keepends=True)[index]) for index in (0, -1))
        assert (entry.first_seq, entry.last_seq, entry.hash) == (first.seq, last.seq, last.hash)
        assert (last.event, entry.bytes) == ("log.rotate", path.stat().st_size)
        assert 4096 <= entry.bytes < 4096 + 1000
        begin = after.read_bytes().splitlines(keepends=True)
        assert not begin or read_record(begin[0]).prev == last.hash
    assert things(tmp_path) == list(range(100))
    found = check(tmp_path)
    assert (found.ok, found.records) == (True, 100 + len(closed))


@pytest.mark.parametrize("reached", ["line", "renamed", "manifest"])
async def test_a_crash_in_a_rotation(tmp_path: Path, reached: str) -> None:
    """After the last line, after the file has its new name, and after the manifest knows of it."""
    log = tmp_path / "audit.jsonl"
    await write_log(tmp_path, 30, max_file_bytes=4096)
    number, path = closed_files(log)[-1]
    log.unlink()
    manifest = manifest_path(log).read_bytes().splitlines(keepends=True)
    if reached != "manifest":
        manifest_path(log).write_bytes(b"".join(manifest[:-1]) + manifest[-1][:20])
    if reached == "line":
        path.rename(log)
    # The checkpoints are of records that this crash would have prevented.
    (tmp_path / "audit-checkpoints.jsonl").unlink()
    async with open_log(tmp_path) as again:
        await again.record(AuditEvent(event="thing", fields={"n": -1}))
    assert closed_files(log)[-1] == (number, path)
    assert records(tmp_path)[-1]["n"] == -1
    entries = list(read_manifest(log, (tmp_path / "audit.key").read_bytes()))
    assert [entry.file for entry in entries] == [path.name for _, path in closed_files(log)]
    assert manifest_path(log).read_bytes().splitlines(keepends=True)[-1] == manifest[-1]
    assert check(tmp_path).ok


async def test_a_lost_open_file_is_no_crash(tmp_path: Path) -> None:
    await write_log(tmp_path, 30, max_file_bytes=4096)
    log = tmp_path / "audit.jsonl"
    _, path = closed_files(log)[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    log.unlink()
    with pytest.raises(ConfigError, match=r"is missing or empty, but .* was not the last of its files"):
        await write_log(tmp_path, 1)
