"""Making, changing, rotating and revoking keys, and what may be asked for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inferflux_core.access.keys import rows as key_rows
from inferflux_core.access.keys.form import parse_key
from inferflux_core.access.keys.pepper import Pepper
from inferflux_core.access.keys.records import KeyChange, KeyRecord, NewKey, key_principal, key_public
from inferflux_core.access.keys.ring import KeyRing, open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.store import AccessStore
from inferflux_core.access.store_file import connect
from inferflux_core.errors import (
    AccessUnavailableError,
    ConfigError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PreconditionFailedError,
    RequestError,
)
from inferflux_core.identity import Principal
from inferflux_core.settings import Limits

NOW = 1_800_000_000.0
PEPPER = Pepper("p1", b"p" * 32)


class Clock:
    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Iterator[KeyRing]:
    keys = KeyRing(AccessStore(tmp_path / "access.db", write_timeout_s=0.05), PEPPER, now=clock)
    yield keys
    keys.close()


FULL: dict[str, Any] = {
    "name": "CI of the web shop",
    "tenant": "acme",
    "owner": "Ann <ann@example.com>",
    "scopes": ["generate", "admin"],
    "roles": ["user", "ops"],
    "models": ["demo", "team-a/**"],
    "limits": {"rpm": 60, "max_tokens": 512},
    "priority": 5,
    "cidr": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7"],
    "expires_at": "2027-06-01T12:00:00+02:00",
}
EXPIRES = datetime(2027, 6, 1, 10, tzinfo=UTC).timestamp()


async def test_a_key_with_everything(keys: KeyRing) -> None:
    record, key = await keys.create(NewKey.model_validate(FULL))
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.env, parsed.id) == ("live", record.id)
    assert record == KeyRecord(
        id=parsed.id,
        name="CI of the web shop",
        tenant="acme",
        owner="Ann <ann@example.com>",
        scopes=frozenset({"generate", "admin"}),
        roles=frozenset({"user", "ops"}),
        models=("demo", "team-a/**"),
        limits=Limits(rpm=60, max_tokens=512),
        priority=5,
        cidr=("10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"),
        created_at=NOW,
        expires_at=EXPIRES,
    )
    assert await keys.get(record.id) == record
    assert key_principal(record) == Principal(
        subject=f"key:{record.id}",
        tenant="acme",
        method="api_keys",
        scopes=frozenset({"generate", "admin"}),
        roles=frozenset({"user", "ops"}),
        models=("demo", "team-a/**"),
        limits=Limits(rpm=60, max_tokens=512),
        priority=5,
        expires_at=EXPIRES,
        name="CI of the web shop",
    )


async def test_the_public_form(keys: KeyRing) -> None:
    record, key = await keys.create(NewKey.model_validate(FULL))
    public = key_public(replace(record, last_used_at=NOW + 0.25, revoked_at=NOW + 60))
    assert public == {
        "id": record.id,
        "name": "CI of the web shop",
        "tenant": "acme",
        "owner": "Ann <ann@example.com>",
        "scopes": ["generate", "admin"],
        "roles": ["ops", "user"],
        "models": ["demo", "team-a/**"],
        "limits": {"rpm": 60, "tpm": None, "concurrency": None, "daily_tokens": None, "max_tokens": 512},
        "priority": 5,
        "cidr": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"],
        "created_at": "2027-01-15T08:00:00.000Z",
        "expires_at": "2027-06-01T10:00:00.000Z",
        "last_used_at": "2027-01-15T08:00:00.250Z",
        "rotated_at": None,
        "revoked_at": "2027-01-15T08:01:00.000Z",
        "version": 1,
    }
    assert key[-49:] not in json.dumps(public) + repr(record)


async def test_the_least_key(keys: KeyRing) -> None:
    record, _ = await keys.create(NewKey(name="k", expires_in_s=60))
    assert (record.tenant, record.scopes) == ("default", frozenset({"generate", "embed", "read"}))
    assert (record.models, record.limits, record.cidr, record.expires_at) == (None, None, (), NOW + 60)


async def test_neither_key_nor_secret_is_in_the_store(keys: KeyRing, tmp_path: Path) -> None:
    _, key = await keys.create(NewKey(name="k"))
    (stored,) = keys.store.read("SELECT pepper_id, hash, valid_until FROM key_hashes")
    assert stored == ("p1", PEPPER.hash(key).hash, None)
    keys.close()
    assert key[-49:-6].encode() not in (tmp_path / "access.db").read_bytes()


async def test_list(keys: KeyRing, clock: Clock) -> None:
    made = []
    for name in ("c", "a", "b"):
        made.append((await keys.create(NewKey(name=name)))[0])
        clock.time += 1
    assert await keys.list() == made


async def test_update(keys: KeyRing, clock: Clock) -> None:
    record, _ = await keys.create(NewKey.model_validate(FULL))
    clock.time += 5
    change = KeyChange.model_validate({"name": "new", "scopes": ["read"], "models": None, "limits": None, "expires_at": None})
    changed = await keys.update(record.id, change, 1)
    assert changed == replace(
        record, name="new", scopes=frozenset({"read"}), models=None, limits=None, expires_at=None, version=2
    )
    assert await keys.get(record.id) == changed
    later = await keys.update(record.id, KeyChange(expires_in_s=10, cidr=()), 2)
    assert later == replace(changed, expires_at=NOW + 15, cidr=(), version=3)
    assert await keys.update(record.id, KeyChange(), 3) == replace(later, version=4)


async def test_a_version_that_is_not_current(keys: KeyRing) -> None:
    record, _ = await keys.create(NewKey(name="k"))
    await keys.update(record.id, KeyChange(name="theirs"), 1)
    for attempt in (
        keys.update(record.id, KeyChange(name="mine"), 1),
        keys.rotate(record.id, 0, 1),
        keys.revoke(record.id, 1),
    ):
        with pytest.raises(PreconditionFailedError, match="version 2, not 1"):
            await attempt
    assert (await keys.get(record.id)).name == "theirs"
    assert len(keys.store.read("SELECT 1 FROM key_hashes")) == 1


@pytest.mark.parametrize("key_id", ["4fK1c09ZtQpX", "", "' OR 1=1 --", "x" * 5000, "\ud800", "%", "\0"])
async def test_a_key_that_does_not_exist(keys: KeyRing, key_id: str) -> None:
    await keys.create(NewKey(name="k"))
    for attempt in (
        keys.get(key_id),
        keys.update(key_id, KeyChange(name="x"), 1),
        keys.rotate(key_id, 0, None),
        keys.revoke(key_id, None),
    ):
        with pytest.raises(NotFoundError) as caught:
            await attempt
        assert len(caught.value.message) < 500


async def test_revoke(keys: KeyRing, clock: Clock) -> None:
    record, _ = await keys.create(NewKey(name="k"))
    clock.time += 1
    revoked = await keys.revoke(record.id, 1)
    assert revoked == replace(record, revoked_at=NOW + 1, version=2)
    clock.time += 1
    assert await keys.revoke(record.id, 1) == revoked  # the answer to the first call may have been lost
    assert await keys.revoke(record.id, None) == revoked
    for attempt in (keys.update(record.id, KeyChange(name="x"), 2), keys.rotate(record.id, 0, None)):
        with pytest.raises(ConflictError, match="revoked and stays so"):
            await attempt
    assert await keys.get(record.id) == revoked


async def test_rotate(keys: KeyRing, clock: Clock) -> None:
    record, first = await keys.create(NewKey(name="k"))
    clock.time += 1
    rotated, second = await keys.rotate(record.id, 60, 1)
    assert rotated == replace(record, rotated_at=NOW + 1, version=2)
    assert parse_key(second) == parse_key(first)
    assert second != first
    hashes = key_rows.hashes_of(keys.store.read(key_rows.SELECT_WITH_HASHES, (record.id,)))
    assert [h.valid_until for h in hashes] == [None, NOW + 61]
    assert [h.hash for h in hashes] == [PEPPER.hash(second).hash, PEPPER.hash(first).hash]
    # Once more within the overlap: the first secret is at its end at once.
    _, third = await keys.rotate(record.id, 3600, None)
    hashes = key_rows.hashes_of(keys.store.read(key_rows.SELECT_WITH_HASHES, (record.id,)))
    assert [h.hash for h in hashes] == [PEPPER.hash(third).hash, PEPPER.hash(second).hash]
    assert len(keys.store.read("SELECT 1 FROM key_hashes")) == 2


@pytest.mark.parametrize("overlap", [-1, float("nan"), float("inf"), 91 * 86_400])
async def test_an_overlap_out_of_range(keys: KeyRing, overlap: float) -> None:
    record, _ = await keys.create(NewKey(name="k"))
    with pytest.raises(InvalidRequestError) as caught:
        await keys.rotate(record.id, overlap, None)
    assert caught.value.param == "overlap_s"


async def test_times_that_are_past(keys: KeyRing, clock: Clock) -> None:
    past = datetime.fromtimestamp(NOW, UTC)
    record, _ = await keys.create(NewKey(name="k", expires_in_s=10))
    clock.time += 10
    with pytest.raises(InvalidRequestError, match="past"):
        await keys.create(NewKey(name="k", expires_at=past))
    with pytest.raises(InvalidRequestError, match="past"):
        await keys.update(record.id, KeyChange(expires_at=past), 1)
    with pytest.raises(ConflictError, match="expired"):
        await keys.rotate(record.id, 0, None)
    assert (await keys.update(record.id, KeyChange(expires_in_s=5), 1)).expires_at == NOW + 15


async def test_a_store_that_is_locked_or_gone(keys: KeyRing, tmp_path: Path) -> None:
    record, _ = await keys.create(NewKey(name="k"))
    with closing(connect(keys.store.path, 1)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(AccessUnavailableError):
            await keys.revoke(record.id, None)
    assert (await keys.get(record.id)).revoked_at is None
    keys.store.path.unlink()
    for attempt in (keys.create(NewKey(name="k")), keys.get(record.id), keys.list(), keys.revoke(record.id, None)):
        with pytest.raises(RequestError) as caught:
            await attempt
        assert caught.value.code == "auth_unavailable"


@pytest.mark.parametrize(
    ("column", "value"),
    [("scopes", '["root"]'), ("scopes", "[]"), ("scopes", "{"), ("limits", '{"rpm": "many"}'), ("cidr", "7"), ("models", "7")],
)
async def test_a_row_that_nobody_here_wrote(keys: KeyRing, column: str, value: str) -> None:
    record, _ = await keys.create(NewKey(name="k"))

    def damage(connection: sqlite3.Connection) -> None:
        connection.execute(f"UPDATE keys SET {column} = ?", (value,))

    await keys.store.write(damage)
    with pytest.raises(AccessUnavailableError):
        await keys.get(record.id)
    with pytest.raises(AccessUnavailableError):
        await keys.list()
    with pytest.raises(AccessUnavailableError):
        await keys.update(record.id, KeyChange(name="x"), 1)


BAD: list[dict[str, Any]] = [
    {},
    {"name": ""},
    {"name": "   "},
    {"name": "x" * 129},
    {"name": "a\nb"},
    {"name": "a\u202eb"},
    {"name": "a\ud800"},
    {"name": "k", "owner": "a\x1b[31m"},
    {"name": "k", "tenant": ""},
    {"name": "k", "tenant": "a b"},
    {"name": "k", "tenant": "acme\n"},
    {"name": "k", "tenant": "x" * 65},
    {"name": "k", "tenant": "*"},
    {"name": "k", "scopes": []},
    {"name": "k", "scopes": ["root"]},
    {"name": "k", "scopes": None},
    {"name": "k", "roles": ["role:user"]},
    {"name": "k", "roles": [""]},
    {"name": "k", "models": []},
    {"name": "k", "models": ["a b"]},
    {"name": "k", "models": [""]},
    {"name": "k", "models": ["acme-***"]},
    {"name": "k", "models": ["acme-*", "**/a/**/b/**"]},
    {"name": "k", "models": ["acme//chat"]},
    {"name": "k", "limits": {"rpm": 0}},
    {"name": "k", "limits": {"rps": 1}},
    {"name": "k", "priority": 1001},
    {"name": "k", "priority": True, "x": 1},
    {"name": "k", "cidr": ["10.0.0.1/8"]},
    {"name": "k", "cidr": ["localhost"]},
    {"name": "k", "cidr": ["10.0.0.0/33"]},
    {"name": "k", "expires_in_s": 0},
    {"name": "k", "expires_in_s": float("inf")},
    {"name": "k", "expires_in_s": float("nan")},
    {"name": "k", "expires_at": "2030-01-01T00:00:00"},
    {"name": "k", "expires_at": "2030-01-01T00:00:00Z", "expires_in_s": 5},
    {"name": "k", "id": "4fK1c09ZtQpX"},
    {"name": "k", "hash": "x"},
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_what_cannot_be_asked_for(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NewKey.model_validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {"tenant": "other"},
        {"version": 7},
        {"revoked_at": None},
        {"expires_at": "2030-01-01T00:00:00Z", "expires_in_s": 5},
        *({field: None} for field in ("name", "owner", "scopes", "roles", "priority", "cidr", "expires_in_s")),
        *(bad for bad in BAD if bad.get("name") == "k" and "tenant" not in bad),
    ],
)
def test_what_cannot_be_changed(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KeyChange.model_validate(body)


async def test_on_the_host(tmp_path: Path) -> None:
    """The command line's way in: state folder, pepper and store are made if they are missing."""
    keys = open_keys(ApiKeySettings(key_env="test"), tmp_path / "state")
    record, key = await keys.create(NewKey(name="first", scopes=frozenset({"admin"})))
    keys.close()
    assert key.startswith(f"ifx_test_{record.id}_")
    again = open_keys(ApiKeySettings(), tmp_path / "state")
    assert await again.get(record.id) == record
    again.close()


def test_another_pepper_of_the_same_name(tmp_path: Path) -> None:
    open_keys(ApiKeySettings(), tmp_path).close()
    (tmp_path / "pepper").unlink()
    with pytest.raises(ConfigError, match=r"'p1' is not the one that keys in .* were made with; restore that pepper"):
        open_keys(ApiKeySettings(), tmp_path)
    open_keys(ApiKeySettings(pepper_id="p2"), tmp_path).close()


def test_a_store_that_cannot_be_written_at_the_start(tmp_path: Path) -> None:
    store = AccessStore(tmp_path / "access.db", write_timeout_s=0.01)
    try:
        with closing(connect(store.path, 1)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(ConfigError, match="not locked"):
                KeyRing(store, PEPPER)
    finally:
        store.close()
