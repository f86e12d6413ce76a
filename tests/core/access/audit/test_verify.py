"""Verification finds everything that was done to a log, and says where."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.access.audit.audit_logs import check, open_log, write_log
from inferflux_core.access.audit import reader
from inferflux_core.access.audit.chain import Chain, canonical, read_record
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.rotation import closed_files, manifest_path
from inferflux_core.access.audit.verify import verify

Lines = list[bytes]


def change(folder: Path, how: Callable[[Lines], Lines], name: str = "audit.jsonl") -> None:
    path = folder / name
    path.write_bytes(b"".join(how(path.read_bytes().splitlines(keepends=True))))


def forged(line: bytes) -> bytes:
    """A record with other contents, in proper form, its hash left as it was."""
    fields = json.loads(line)
    return canonical({**fields, "n": 99}) + b"\n"


# what was done, the first bad record with the key and checkpoints, with the key alone, with checkpoints and public key
# alone; None where it cannot be noticed. There are ten records, and checkpoints of 4, 8 and 10.
TAMPERING = {
    "edited": (lambda lines: [*lines[:5], forged(lines[5]), *lines[6:]], 6, 6, 5),
    "edited last": (lambda lines: [*lines[:9], forged(lines[9])], 10, 10, 9),
    "deleted": (lambda lines: [*lines[:5], *lines[6:]], 6, 6, 6),
    "deleted first": (lambda lines: lines[1:], 1, 1, 1),
    "inserted": (lambda lines: [*lines[:5], lines[4], *lines[5:]], 6, 6, 6),
    "reordered": (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], 6, 6, 6),
    "end cut off": (lambda lines: lines[:-1], 10, None, 10),
    "half cut off": (lambda lines: lines[:5], 6, None, 6),
    "emptied": (lambda lines: [], 1, None, 1),
    "torn": (lambda lines: [*lines[:-1], lines[-1][:-1]], 10, 10, 10),
    "blank line": (lambda lines: [*lines[:5], b"\n", *lines[5:]], 6, 6, 6),
    "spelt differently": (lambda lines: [*lines[:5], lines[5].replace(b":", b": "), *lines[6:]], 6, 6, 6),
    "key twice": (lambda lines: [*lines[:5], lines[5].replace(b"{", b'{"n":1,'), *lines[6:]], 6, 6, 6),
    "nested deeply": (lambda lines: [*lines[:5], b"[" * 100_000 + b"\n", *lines[6:]], 6, 6, 6),
    "endless line": (lambda lines: [*lines[:5], b"a" * 2_000_000 + b"\n", *lines[6:]], 6, 6, 6),
    "huge number": (lambda lines: [*lines[:5], b'{"seq":' + b"9" * 5000 + b"}\n", *lines[6:]], 6, 6, 6),
    "not text": (lambda lines: [*lines[:5], b"\xff\xfe\n", *lines[6:]], 6, 6, 6),
    "not a number": (lambda lines: [*lines[:5], lines[5].replace(b'"n":1', b'"n":NaN'), *lines[6:]], 6, 6, 6),
}


@pytest.mark.parametrize("name", TAMPERING)
async def test_tampering(tmp_path: Path, name: str) -> None:
    how, with_all, with_key, with_checkpoints = TAMPERING[name]
    await ten_records(tmp_path)
    change(tmp_path, how)
    for found, expected in (
        (check(tmp_path), with_all),
        (check(tmp_path, checkpoints=False), with_key),
        (check(tmp_path, with_key=False), with_checkpoints),
    ):
        assert (found.ok, found.first_bad) == (expected is None, expected), found.reason
        assert (found.reason is None) is found.ok


async def ten_records(folder: Path) -> None:
    await write_log(folder, 4)
    await write_log(folder, 4)
    await write_log(folder, 2)


async def test_a_whole_log(tmp_path: Path) -> None:
    await ten_records(tmp_path)
    for found in (check(tmp_path), check(tmp_path, with_key=False)):
        assert (found.ok, found.records, found.head, found.checkpoints, found.signed_to) == (True, 10, 10, 3, 10)
    assert check(tmp_path, checkpoints=False).signed_to == 0
    assert check(tmp_path, head=10).ok
    assert check(tmp_path, head=11).first_bad == 11
    with pytest.raises(ValueError, match="needs the audit key, or checkpoints"):
        check(tmp_path, with_key=False, checkpoints=False)


async def test_another_log_in_its_place(tmp_path: Path) -> None:
    """Written by a thief of the key, from the beginning or from the middle: the checkpoints know better."""
    await ten_records(tmp_path)
    key = (tmp_path / "audit.key").read_bytes()

    def replaced(lines: Lines, kept: int) -> Lines:
        last = read_record(lines[kept - 1])
        chain = Chain(key, last.seq, last.hash)
        return lines[:kept] + [chain.append({"event": "thing", "n": 99}, "0" * 32, 0) for _ in range(20)]

    change(tmp_path, lambda lines: replaced(lines, 6))
    assert check(tmp_path, checkpoints=False).ok
    found = check(tmp_path)
    assert (found.ok, found.first_bad, found.reason) == (
        False,
        8,
        "record 8 is not the one that was signed: the log was replaced",
    )


async def test_two_ends_of_one_log(tmp_path: Path) -> None:
    """Both authentic: a server was restored from a backup, and its log put together from both."""
    await write_log(tmp_path, 3)
    backup = (tmp_path / "audit.jsonl").read_bytes(), (tmp_path / "audit-checkpoints.jsonl").read_bytes()
    await write_log(tmp_path, 3)
    first = (tmp_path / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "audit.jsonl").write_bytes(backup[0])
    (tmp_path / "audit-checkpoints.jsonl").write_bytes(backup[1])
    await write_log(tmp_path, 3)
    change(tmp_path, lambda lines: [*first[:5], lines[5]])
    found = check(tmp_path, checkpoints=False)
    assert (found.ok, found.first_bad) == (False, 6)
    assert "does not follow the record before" in str(found.reason)


def test_a_rotation_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, chain = tmp_path / "audit.jsonl", Chain(b"k" * 32)
    log.write_bytes(chain.append({"event": "log.rotate"}, "0" * 32, 0))
    looks = 0

    def look(path: Path) -> list[tuple[int, Path]]:
        nonlocal looks
        looks += 1
        found = closed_files(path)
        if looks == 1:
            log.rename(tmp_path / "audit.000001.jsonl")
            log.write_bytes(chain.append({"event": "thing"}, "0" * 32, 0))
        return found

    monkeypatch.setattr(reader, "closed_files", look)
    found = verify(log, key=b"k" * 32)
    assert (found.ok, found.records) == (True, 2)


async def test_a_missing_log(tmp_path: Path) -> None:
    await ten_records(tmp_path)
    (tmp_path / "audit.jsonl").unlink()
    found = check(tmp_path)
    assert (found.ok, found.first_bad, found.reason) == (False, 1, "the file 'audit.jsonl' is missing")


async def test_a_record_of_another_key(tmp_path: Path) -> None:
    await ten_records(tmp_path)
    (tmp_path / "audit.key").write_bytes(b"k" * 32)
    assert check(tmp_path).first_bad == 1


@pytest.mark.parametrize(
    ("how", "first_bad", "reason"),
    [
        (lambda lines: [lines[0].replace(b'"seq":4', b'"seq":3'), *lines[1:]], 1, "line 1 of the checkpoint file: it was not"),
        (lambda lines: [lines[0], b"{}\n", lines[2]], 5, "line 2 of the checkpoint file: it is not a checkpoint"),
        (lambda lines: [lines[0], lines[0]], 4, "the checkpoints are of two logs"),
        (lambda lines: [lines[1], lines[0]], 4, "the checkpoints are of two logs"),
        (lambda lines: [lines[0], b"[" * 5000 + b"\n"], 5, "line 2 of the checkpoint file: it is not a checkpoint"),
        (lambda lines: [*lines[:2], lines[2][:-1]], None, None),  # a crash while it was written
        (lambda lines: [lines[0], lines[2]], None, None),  # who can delete some can delete all: hence another disk
    ],
)
async def test_checkpoints(tmp_path: Path, how: Callable[[Lines], Lines], first_bad: int | None, reason: str | None) -> None:
    await ten_records(tmp_path)
    change(tmp_path, how, "audit-checkpoints.jsonl")
    found = check(tmp_path)
    assert (found.ok, found.first_bad) == (first_bad is None, first_bad), found.reason
    assert (reason or "") in (found.reason or "")


async def test_a_checkpoint_of_another_server(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        await write_log(tmp_path / name, 3)
    (tmp_path / "a/audit-checkpoints.jsonl").write_bytes((tmp_path / "b/audit-checkpoints.jsonl").read_bytes())
    assert "not signed with this key" in str(check(tmp_path / "a").reason)


async def test_closed_files(tmp_path: Path) -> None:
    await write_log(tmp_path, 60, max_file_bytes=4096, checkpoint_records=5)
    assert check(tmp_path).ok
    files = [path.name for _, path in closed_files(tmp_path / "audit.jsonl")]
    sizes = {name: len((tmp_path / name).read_bytes().splitlines()) for name in files}

    change(tmp_path, lambda lines: [*lines[:3], forged(lines[3]), *lines[4:]], files[1])
    assert check(tmp_path).first_bad == sizes[files[0]] + 4
    assert check(tmp_path, with_key=False).first_bad is not None


async def test_closed_files_that_are_missing_or_moved(tmp_path: Path) -> None:
    await write_log(tmp_path, 60, max_file_bytes=4096, checkpoint_records=5)
    first, second, third = (path for _, path in closed_files(tmp_path / "audit.jsonl")[:3])
    bounds = [len(path.read_bytes().splitlines()) for path in (first, second)]

    second.rename(tmp_path / "away")
    found = check(tmp_path, allow_pruned=True)
    assert (found.ok, found.first_bad) == (False, bounds[0] + 1)

    first.rename(tmp_path / "away1")  # now the beginning is missing, which an administrator may have archived
    found = check(tmp_path)
    assert (found.ok, found.first_bad) == (False, 1)
    assert "the log begins with record" in str(found.reason)
    for with_key in (True, False):
        found = check(tmp_path, allow_pruned=True, with_key=with_key)
        assert found.ok, found.reason
        assert found.head - found.records == sum(bounds)

    change(tmp_path, lambda lines: lines[1:], third.name)
    assert "where no file of the manifest ended" in str(check(tmp_path, allow_pruned=True).reason)


async def test_a_forged_manifest(tmp_path: Path) -> None:
    await write_log(tmp_path, 60, max_file_bytes=4096)
    closed_files(tmp_path / "audit.jsonl")[0][1].unlink()
    manifest = manifest_path(tmp_path / "audit.jsonl")
    manifest.write_bytes(manifest.read_bytes().replace(b'"mac":"', b'"mac":"0'))
    assert not check(tmp_path, allow_pruned=True).ok


async def test_lines_moved_to_another_file(tmp_path: Path) -> None:
    """The same records in the same order, but not where they were."""
    await write_log(tmp_path, 60, max_file_bytes=4096)
    first, second = (path for _, path in closed_files(tmp_path / "audit.jsonl")[:2])
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(lines[:-1]))
    second.write_bytes(lines[-1] + second.read_bytes())
    assert "its end is missing" in str(check(tmp_path).reason)
    second.write_bytes(b"".join(second.read_bytes().splitlines(keepends=True)[1:]))
    first.write_bytes(b"".join(lines) + second.read_bytes())
    second.unlink()
    assert "the file goes on after 'log.rotate'" in str(check(tmp_path).reason)


async def test_while_the_server_writes_and_rotates(tmp_path: Path) -> None:
    begun, done = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        async with open_log(tmp_path, max_file_bytes=4096, checkpoint_records=3) as log:
            begun.set()
            for number in range(1500):
                await log.record(AuditEvent(event="thing", fields={"n": number}))
                if number % 20 == 0:
                    await asyncio.sleep(0.001)
        done.set()

    writing = asyncio.create_task(write())
    await begun.wait()
    rounds = 0
    while not done.is_set():
        found = await asyncio.to_thread(check, tmp_path, patience_s=5.0)
        assert found.ok, found.reason
        rounds += 1
    await writing
    assert rounds > 0
    assert check(tmp_path).signed_to == check(tmp_path).head


async def _small_log(folder: Path) -> bytes:
    await write_log(folder, 3)
    return (folder / "audit.jsonl").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("small")
    return folder, asyncio.run(_small_log(folder))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_other_byte_is_noticed(small: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, whole = small
    position = data.draw(st.integers(0, len(whole) - 1), "position")
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]), "byte")
    (folder / "audit.jsonl").write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    found = check(folder, checkpoints=False)
    assert not found.ok
    assert found.first_bad == whole[:position].count(b"\n") + 1
    assert not check(folder, with_key=False).ok
    (folder / "audit.jsonl").write_bytes(whole)
    assert check(folder).ok


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    key = b"k" * 32
    chain = Chain(key)
    with (tmp_path / "audit.jsonl").open("wb") as file:
        for number in range(3000):
            file.write(chain.append({"event": "thing", "text": "x" * 400, "n": number}, "0" * 32, number))
    assert (tmp_path / "audit.jsonl").stat().st_size > 2_000_000
    verify(tmp_path / "audit.jsonl", key=key)  # imports and caches
    tracemalloc.start()
    try:
        assert verify(tmp_path / "audit.jsonl", key=key).records == 3000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()
