"""The audit log as the server uses it: what a record is, what a full queue means, one writer, files and their modes."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import threading
from pathlib import Path

import pytest

from core.access.audit.audit_logs import Counted, check, modes, open_log, records, things, write_log
from inferflux_core.access.audit.chained_log import ChainedLog
from inferflux_core.access.audit.events import AuditEvent, record_fields
from inferflux_core.access.audit.log import AuditLog, NoAudit
from inferflux_core.errors import AccessUnavailableError, ConfigError
from inferflux_core.identity import Principal
from inferflux_core.settings import AuditSettings

HOSTILE = 'x\n{"event":"forged"}\r\x1b[31m\u202e\u2028\x7f\x00\ud800"'


async def test_a_record(tmp_path: Path) -> None:
    principal = Principal(subject="user:https://id.example|a|b", tenant="acme", method="oidc", name="Ann")
    async with open_log(tmp_path) as log:
        await log.record(
            AuditEvent(event="request.completed", request_id="r1", principal=principal, address="::1", fields={"status": 200})
        )
    (line,) = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", record.pop("ts"))
    assert re.fullmatch("[0-9a-f]{32}", record.pop("boot_id"))
    digest = record.pop("hash")
    assert record == {
        "actor": {"kind": "user", "id": "a|b", "iss": "https://id.example", "tenant": "acme", "name": "Ann"},
        "address": "::1",
        "auth_method": "oidc",
        "event": "request.completed",
        "prev": "0" * 64,
        "request_id": "r1",
        "seq": 1,
        "status": 200,
    }
    # The formula of the documentation, without any code of ours.
    body = re.sub(rb'"hash":"[0-9a-f]{64}",', b"", line)
    key = (tmp_path / "audit.key").read_bytes()
    assert digest == hmac.new(key, b"0" * 64 + body, "sha256").hexdigest()
    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("subject", "kind", "identifier"),
    [("key:abc", "key", "abc"), ("anonymous", "anonymous", "anonymous"), ("user:x", "user", "x")],
)
def test_actor(subject: str, kind: str, identifier: str) -> None:
    fields = record_fields(AuditEvent(event="e", principal=Principal(subject=subject)))
    assert fields["actor"] == {"kind": kind, "id": identifier, "tenant": "default"}


async def test_what_a_client_sends_stays_within_its_line(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await log.record(
            AuditEvent(
                event="e",
                address=HOSTILE,
                request_id=HOSTILE,
                principal=Principal(subject=f"key:{HOSTILE}", name=HOSTILE),
                fields={"agent": HOSTILE + "A" * 2**20, HOSTILE: [HOSTILE]},
            )
        )
    data = (tmp_path / "audit.jsonl").read_bytes()
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in data[:-1])
    (record,) = records(tmp_path)
    assert record["event"] == "e"
    assert record["agent"] == (HOSTILE + "A" * 2**20)[:511] + "…"
    assert record[HOSTILE] == [HOSTILE]
    assert check(tmp_path).ok


def test_values_have_one_form() -> None:
    fields = record_fields(
        AuditEvent(event="e", fields={"f": 0.5, "nan": float("nan"), "big": 2**64, "t": (1, True, None), "s": {"b", "a"}})
    )
    assert fields == {"event": "e", "f": "0.5", "nan": "nan", "big": hex(2**64), "t": [1, True, None], "s": ["a", "b"]}
    deep: dict[str, object] = {}
    for _ in range(100):
        deep = {"d": deep}
    assert json.dumps(record_fields(AuditEvent(event="e", fields={"deep": deep}))).count("d") < 20
    with pytest.raises(ValueError, match="cannot have a field named 'hash'"):
        record_fields(AuditEvent(event="e", fields={"hash": "x"}))
    with pytest.raises(TypeError, match="cannot hold a bytes"):
        record_fields(AuditEvent(event="e", fields={"x": b"secret"}))


async def test_an_event_too_large_for_a_line_keeps_who_and_what(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await log.record(AuditEvent(event="e", request_id="r", fields={"x": ["é" * 512] * 250}))
    (record,) = records(tmp_path)
    assert (record["event"], record["request_id"], "x" in record) == ("e", "r", False)
    assert record["omitted_bytes"] > 512 * 1024
    assert check(tmp_path).ok


async def test_files_are_private_and_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    await write_log(tmp_path, 2)
    await write_log(tmp_path, 1)
    assert modes(tmp_path) == dict.fromkeys(
        (
            "audit.jsonl",
            "audit.jsonl.lock",
            "audit.key",
            "audit-checkpoint.key",
            "audit-checkpoint.pub",
            "audit-checkpoints.jsonl",
        ),
        0o600,
    )
    found = records(tmp_path)
    assert [record["seq"] for record in found] == [1, 2, 3]
    assert found[2]["prev"] == found[1]["hash"]
    assert found[2]["boot_id"] != found[1]["boot_id"]
    assert (check(tmp_path).signed_to, check(tmp_path).checkpoints) == (3, 2)


async def test_the_last_record_is_the_one_given_to_close(tmp_path: Path) -> None:
    async with open_log(tmp_path, counts := Counted()) as log:
        log.record_soon(AuditEvent(event="before"))
        await log.close(AuditEvent(event="server.stop"))
        log.record_soon(AuditEvent(event="after"))
        with pytest.raises(AccessUnavailableError):
            await log.record(AuditEvent(event="after"))
    assert [record["event"] for record in records(tmp_path)] == ["before", "server.stop"]
    assert counts == {"records": 2, "dropped": 2}
    assert (log.healthy, log.head) == (False, 0)


async def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        second = AuditLog(AuditSettings(), tmp_path, Counted())
        with pytest.raises(ConfigError, match=r"another process writes the audit log '.*audit\.jsonl'"):
            await second.start()
        await log.record(AuditEvent(event="still mine"))
    await write_log(tmp_path, 1)
    assert check(tmp_path).records == 2


async def test_records_of_many_tasks_and_threads(tmp_path: Path) -> None:
    async with open_log(tmp_path, counts := Counted(), fsync="each", checkpoint_records=7) as log:
        threads = [
            threading.Thread(target=log.record_soon, args=(AuditEvent(event="thing", fields={"n": 100 + number}),))
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        await asyncio.gather(*(log.record(AuditEvent(event="thing", fields={"n": number})) for number in range(100)))
        for thread in threads:
            thread.join()
    assert sorted(things(tmp_path)) == list(range(120))
    assert counts == {"records": 120}
    found = check(tmp_path)
    assert (found.ok, found.records, found.signed_to) == (True, 120, 120)


async def test_each_returns_when_the_record_is_in_the_file(tmp_path: Path) -> None:
    async with open_log(tmp_path, fsync="each") as log:
        for number in range(3):
            await log.record(AuditEvent(event="thing", fields={"n": number}))
            assert things(tmp_path) == list(range(number + 1))
            assert log.head == number + 1


class Gate:
    """Holds the writer before it appends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        append = ChainedLog.append

        def held(log: ChainedLog, entries: object) -> int:
            assert self.opened.wait(10)
            return append(log, entries)  # type: ignore[arg-type]

        monkeypatch.setattr(ChainedLog, "append", held)


async def test_a_full_queue_makes_requests_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with open_log(tmp_path, queue_size=2) as log:
        await log.record(AuditEvent(event="thing", fields={"n": 0}))
        await log.record(AuditEvent(event="thing", fields={"n": 1}))
        tasks = [asyncio.create_task(log.record(AuditEvent(event="thing", fields={"n": n}))) for n in (2, 3, 4)]
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False, False]
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        gate.opened.set()
        await asyncio.gather(tasks[0], tasks[2])
        log.check()
    assert sorted(things(tmp_path)) == [0, 1, 2, 3, 4]  # the cancelled one too


async def test_a_full_queue_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with open_log(tmp_path, counts := Counted(), queue_size=2, on_full="drop") as log:
        for number in range(5):
            await log.record(AuditEvent(event="thing", fields={"n": number}))
        important = asyncio.create_task(log.record(AuditEvent(event="thing", fields={"n": 9}), important=True))
        await asyncio.sleep(0)
        assert not important.done()
        assert counts["dropped"] == 3
        gate.opened.set()
        await important
    assert things(tmp_path) == [0, 1, 9]
    assert [record["records"] for record in records(tmp_path) if record["event"] == "log.dropped"] == [3]


async def test_drops_in_many_threads_are_counted_and_told_even_when_nothing_follows(tmp_path: Path) -> None:
    async with open_log(tmp_path, counts := Counted(), on_full="drop") as log:
        writer = log._writer
        assert writer is not None
        threads = [threading.Thread(target=lambda: [writer.drop() for _ in range(500)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = records(tmp_path)
    assert {record["event"] for record in found} == {"log.dropped"}
    assert sum(record["records"] for record in found) == counts["dropped"] == 4000
    assert check(tmp_path).ok


async def test_a_full_queue_refuses_new_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with open_log(tmp_path, counts := Counted(), queue_size=2, on_full="reject") as log:
        log.check()
        for number in range(9):
            await log.record(AuditEvent(event="thing", fields={"n": number}))
        with pytest.raises(AccessUnavailableError) as refused:
            log.check()
        assert (refused.value.code, refused.value.status) == ("audit_unavailable", 503)
        assert counts["dropped"] == 5
        gate.opened.set()
    assert things(tmp_path) == [0, 1, 2, 3]


async def test_no_audit(tmp_path: Path) -> None:
    log = NoAudit()
    await log.start()
    await log.record(AuditEvent(event="e"), important=True)
    log.record_soon(AuditEvent(event="e"))
    log.check()
    await log.close(AuditEvent(event="e"))
    assert (log.enabled, log.healthy, log.head, log.keeps_content, log.content("x")) == (False, True, 0, False, {})
    assert AuditLog(AuditSettings(), tmp_path, Counted()).enabled


async def test_a_required_log_that_is_not_open_refuses(tmp_path: Path) -> None:
    log = AuditLog(AuditSettings(required=True), tmp_path, Counted())
    with pytest.raises(AccessUnavailableError):
        log.check()
    await log.close()


def _other_key(folder: Path) -> None:
    (folder / "audit.key").write_bytes(b"k" * 32)


def _short_key(folder: Path) -> None:
    (folder / "audit.key").write_bytes(b"k")


def _open_key(folder: Path) -> None:
    (folder / "audit.key").chmod(0o644)


def _change_last(folder: Path) -> None:
    path = folder / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":4', b'"n":5'))


def _cut_last(folder: Path) -> None:
    path = folder / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _no_checkpoints_folder(folder: Path) -> None:
    (folder / "audit-checkpoints.jsonl").unlink()
    (folder / "audit-checkpoints.jsonl").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "audit.key").unlink(), "has records, but its key .* is missing"),
        (lambda folder: (folder / "audit.jsonl").unlink(), "ends with record 0, but a checkpoint says that it had 5"),
        (_other_key, "record 5 of the audit log .* was not written with the key of this server"),
        (_short_key, "has 1 bytes instead of 32"),
        (_open_key, r"the audit key .*audit.key' can be read or written by others \(mode 644\)"),
        (_change_last, "record 5 of the audit log .* or was changed"),
        (_cut_last, "ends with record 4, but a checkpoint says that it had 5"),
        (
            lambda folder: (folder / "audit.jsonl").write_bytes(b"hello\n"),
            "was changed by something else: the line is not JSON",
        ),
        (lambda folder: (folder / "audit-checkpoints.jsonl").write_bytes(b"hello\n"), "it is not a checkpoint"),
        (lambda folder: (folder / "audit-checkpoint.key").write_bytes(b"hello"), "is not a PEM key"),
        (lambda folder: (folder / "audit-checkpoint.pub").write_bytes(b"hello"), "is not the public half"),
        (_no_checkpoints_folder, "audit.checkpoint_file: .* cannot be opened for writing"),
    ],
)
async def test_a_start_that_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    await write_log(tmp_path, 5)
    damage(tmp_path)  # type: ignore[operator]
    log = AuditLog(AuditSettings(), tmp_path, Counted())
    with pytest.raises(ConfigError, match=message):
        await log.start()
    await log.close()


async def test_a_log_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="is not a regular file"):
        await AuditLog(AuditSettings(), tmp_path, Counted()).start()
    same = AuditSettings(file=tmp_path / "a", checkpoint_file=tmp_path / "a")
    with pytest.raises(ConfigError, match="is the audit log itself"):
        await AuditLog(same, tmp_path, Counted()).start()
