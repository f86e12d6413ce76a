"""The access store: what it makes, what it refuses, and what happens when the file goes wrong under it."""

# ruff: noqa: ASYNC240  # a test has the event loop to itself

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from inferflux_core.access import store_schema
from inferflux_core.access.store import AccessStore, Document
from inferflux_core.access.store_file import connect
from inferflux_core.errors import AccessUnavailableError, ConfigError, PreconditionFailedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "access.db"


@pytest.fixture
def store(path: Path) -> Iterator[AccessStore]:
    store = AccessStore(path, write_timeout_s=0.05)
    yield store
    store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_files_are_private(store: AccessStore, path: Path) -> None:
    await store.put_document("limits", {}, None)
    assert mode(path.parent) == 0o700
    assert {name.name: mode(name) for name in path.parent.iterdir()} == {
        "access.db": 0o600,
        "access.db-shm": 0o600,
        "access.db-wal": 0o600,
    }


async def test_how_the_file_is_kept(store: AccessStore, path: Path) -> None:
    with closing(connect(path, 1)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(store_schema.MIGRATIONS),)
        tables = connection.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
    ours = {name: strict for name, strict in tables if not name.startswith("sqlite_")}
    assert ours == {"keys": 1, "key_hashes": 1, "peppers": 1, "documents": 1}
    written = await store.write(lambda c: (c.execute("PRAGMA synchronous").fetchone()[0], threading.current_thread().name))
    assert written[0] == 2  # FULL
    assert written[1].startswith("inferflux-access-store")


async def test_documents(store: AccessStore) -> None:
    assert await store.get_document("limits") is None
    with pytest.raises(PreconditionFailedError, match="version 0, not 1"):
        await store.put_document("limits", {"a": 1}, 1)
    assert await store.put_document("limits", {"a": 1}, 0) == Document({"a": 1}, 1)
    with pytest.raises(PreconditionFailedError, match="version 1, not 0"):
        await store.put_document("limits", {"a": 2}, 0)
    assert await store.get_document("limits") == Document({"a": 1}, 1)
    assert await store.put_document("limits", {"b": None}, 1) == Document({"b": None}, 2)
    assert await store.put_document("limits", {"c": [1]}, None) == Document({"c": [1]}, 3)
    assert await store.get_document("routing") is None
    with pytest.raises(ValueError, match="JSON"):
        await store.put_document("limits", {"a": float("nan")}, None)


async def test_of_many_writers_of_one_version_one_wins(path: Path, store: AccessStore) -> None:
    other = AccessStore(path)
    try:
        puts = [s.put_document("limits", {"n": i}, 0) for i, s in enumerate([store, other] * 8)]
        results = await asyncio.gather(*puts, return_exceptions=True)
    finally:
        other.close()
    assert [r for r in results if isinstance(r, Document)] == [await store.get_document("limits")]
    assert sum(isinstance(r, PreconditionFailedError) for r in results) == 15


async def test_it_stays(path: Path) -> None:
    for version in (1, 2):
        store = AccessStore(path)
        assert (await store.put_document("limits", {}, version - 1)).version == version
        store.close()
        store.close()
    with pytest.raises(AccessUnavailableError):
        await store.get_document("limits")
    with pytest.raises(AccessUnavailableError):
        await store.put_document("limits", {}, None)


async def test_what_a_change_raises_undoes_it(store: AccessStore) -> None:
    def change(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO documents VALUES ('limits', '{}', 1)")
        raise KeyError("x")

    with pytest.raises(KeyError):
        await store.write(change)
    assert await store.get_document("limits") is None
    assert (await store.put_document("limits", {}, 0)).version == 1


# --- start refused --------------------------------------------------------------------------------------------------


def refused(path: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        AccessStore(path, write_timeout_s=0.05)
    assert repr(str(path)) in str(caught.value) or repr(str(path.parent)) in str(caught.value)


def test_a_file_that_is_no_database(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"not a database" * 100)
    path.chmod(0o600)
    refused(path, "not a database; restore it from a backup")
    assert path.read_bytes() == b"not a database" * 100


def test_a_truncated_database(path: Path) -> None:
    AccessStore(path).close()
    os.truncate(path, 5000)
    refused(path, "restore it from a backup")


def test_a_database_with_a_damaged_page(path: Path) -> None:
    AccessStore(path).close()
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    refused(path, "restore it from a backup")


def test_a_newer_database(path: Path) -> None:
    AccessStore(path).close()
    with closing(connect(path, 1)) as connection:
        connection.execute("PRAGMA user_version=99")
    refused(path, "newer InferFlux .its version is 99")


def test_a_locked_database(path: Path) -> None:
    AccessStore(path).close()
    with closing(connect(path, 1)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        refused(path, "locked by another program")
    AccessStore(path).close()


def test_a_file_that_others_may_read(path: Path) -> None:
    AccessStore(path).close()
    path.chmod(0o640)
    refused(path, "chmod 600")


def test_a_folder_that_others_may_write_to(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o770)
    refused(path, "chmod go-w")


def test_a_folder_in_place_of_the_file(path: Path) -> None:
    path.mkdir(parents=True)
    refused(path, "not a regular file")


def test_a_file_in_place_of_the_folder(path: Path) -> None:
    path.parent.write_text("")
    refused(path, "is not a folder")


# --- under a running server -------------------------------------------------------------------------------------------


async def test_a_write_while_another_process_holds_the_lock(store: AccessStore, path: Path) -> None:
    with closing(connect(path, 1)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(AccessUnavailableError) as caught:
            await store.put_document("limits", {}, 0)
        assert await store.get_document("limits") is None  # reading goes on
    assert caught.value.code == "auth_unavailable"
    assert str(path) not in caught.value.message
    assert (await store.put_document("limits", {}, 0)).version == 1


async def test_deleted_and_put_back(store: AccessStore, path: Path) -> None:
    await store.put_document("limits", {"a": 1}, 0)
    assert await store.get_document("limits") == Document({"a": 1}, 1)
    away = path.with_name("away.db")
    with closing(connect(path, 1)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.rename(away)
    for _ in range(2):
        with pytest.raises(AccessUnavailableError):
            await store.get_document("limits")
        with pytest.raises(AccessUnavailableError):
            await store.put_document("limits", {}, None)
    assert not path.exists()  # a running server never begins a new store
    away.rename(path)
    assert await store.get_document("limits") == Document({"a": 1}, 1)
    assert (await store.put_document("limits", {}, 1)).version == 2


async def test_replaced_by_another_store(store: AccessStore, path: Path, tmp_path: Path) -> None:
    await store.put_document("limits", {"old": True}, 0)
    assert await store.get_document("limits") == Document({"old": True}, 1)
    other = AccessStore(tmp_path / "other.db")
    await other.put_document("limits", {"new": True}, 0)
    other.close()
    (tmp_path / "other.db").chmod(0o644)
    for name in path.parent.iterdir():
        name.unlink()
    (tmp_path / "other.db").rename(path)
    with pytest.raises(AccessUnavailableError):  # others may have read it
        await store.get_document("limits")
    path.chmod(0o600)
    assert await store.get_document("limits") == Document({"new": True}, 1)


async def test_replaced_by_rubbish(store: AccessStore, path: Path) -> None:
    for name in path.parent.iterdir():
        name.unlink()
    path.write_bytes(b"x" * 10_000)
    path.chmod(0o600)
    with pytest.raises(AccessUnavailableError):
        await store.get_document("limits")
    with pytest.raises(AccessUnavailableError):
        await store.put_document("limits", {}, None)


async def test_overwritten_in_place(store: AccessStore, path: Path) -> None:
    await store.put_document("limits", {}, 0)
    with closing(connect(path, 1)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with path.open("r+b") as file:  # the header stays, every table is rubbish
        file.seek(100)
        file.write(b"\xff" * (size - 100))
    store._reader.close()  # what SQLite has read already it may go on to use, since no transaction has changed it
    with pytest.raises(AccessUnavailableError):
        await store.get_document("limits")


async def test_a_value_that_nobody_here_wrote(store: AccessStore, path: Path) -> None:
    await store.write(lambda c: c.execute("INSERT INTO documents VALUES ('limits', 'rubbish', 1)"))
    with pytest.raises(AccessUnavailableError):
        await store.get_document("limits")


async def test_one_log_line_for_many_failures(store: AccessStore, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.unlink()
    with caplog.at_level(logging.ERROR, "inferflux.access"):
        for _ in range(100):
            with pytest.raises(AccessUnavailableError):
                await store.get_document("limits")
    assert [(r.message, r.__dict__["fields"]) for r in caplog.records] == [
        ("the access store cannot be used", {"path": str(path), "cause": "FileNotFoundError"})
    ]


# --- migrations -------------------------------------------------------------------------------------------------------


async def test_an_older_file_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AccessStore(path)
    await store.put_document("limits", {"a": 1}, 0)
    old = store_schema.MIGRATIONS
    monkeypatch.setattr(store_schema, "MIGRATIONS", (*old, ("ALTER TABLE documents ADD COLUMN note TEXT",)))
    newer = AccessStore(path)
    assert newer.read("SELECT note FROM documents") == [(None,)]
    assert await newer.get_document("limits") == Document({"a": 1}, 1)
    newer.close()
    monkeypatch.setattr(store_schema, "MIGRATIONS", old)
    store.close()
    refused(path, "newer InferFlux")


def test_a_migration_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AccessStore(path).close()
    old = store_schema.MIGRATIONS
    monkeypatch.setattr(store_schema, "MIGRATIONS", (*old, ("CREATE TABLE extra (a)", "CREATE TABLE keys (a)")))
    refused(path, "table keys already exists")
    monkeypatch.setattr(store_schema, "MIGRATIONS", old)
    store = AccessStore(path)
    assert store.read("SELECT name FROM sqlite_schema WHERE name = 'extra'") == []
    store.close()
