"""Rows of the access store's key tables, and the records that they stand for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from inferflux_core.access.keys.pepper import MAX_HASHES, SecretHash
from inferflux_core.access.keys.records import KeyRecord
from inferflux_core.identity import ACTIONS
from inferflux_core.settings import Limits

COLUMNS = (
    "id",
    "name",
    "tenant",
    "owner",
    "scopes",
    "roles",
    "models",
    "limits",
    "priority",
    "cidr",
    "created_at",
    "expires_at",
    "last_used_at",
    "revoked_at",
    "rotated_at",
    "version",
)

SELECT = f"SELECT {', '.join(COLUMNS)} FROM keys"  # noqa: S608  # constants of this file
SELECT_ONE = f"{SELECT} WHERE id = ?"
SELECT_ALL = f"{SELECT} ORDER BY created_at, id"
SELECT_WITH_HASHES = (
    f"SELECT {', '.join('keys.' + column for column in COLUMNS)}, pepper_id, hash, valid_until"  # noqa: S608
    f" FROM keys LEFT JOIN key_hashes ON key_id = id WHERE id = ? ORDER BY seq DESC LIMIT {MAX_HASHES}"
)
"""A row for each hash of the key, the current one first; one row with NULLs if it has none."""

_INSERT = f"INSERT INTO keys ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
_UPDATE = f"UPDATE keys SET {', '.join(f'{column} = ?' for column in COLUMNS)} WHERE id = ?"  # noqa: S608


def insert(connection: sqlite3.Connection, record: KeyRecord) -> None:
    connection.execute(_INSERT, _values(record))


def replace(connection: sqlite3.Connection, record: KeyRecord) -> None:
    connection.execute(_UPDATE, (*_values(record), record.id))


def add_hash(connection: sqlite3.Connection, key_id: str, secret: SecretHash) -> None:
    connection.execute(
        "INSERT INTO key_hashes (key_id, pepper_id, hash, valid_until) VALUES (?, ?, ?, ?)",
        (key_id, secret.pepper_id, secret.hash, secret.valid_until),
    )


def end_hashes(connection: sqlite3.Connection, key_id: str, valid_until: float) -> None:
    """Let the current secret end then, and every older one now."""
    connection.execute("DELETE FROM key_hashes WHERE key_id = ? AND valid_until IS NOT NULL", (key_id,))
    connection.execute("UPDATE key_hashes SET valid_until = ? WHERE key_id = ?", (valid_until, key_id))


def used(connection: sqlite3.Connection, times: dict[str, float]) -> None:
    """Note when keys were last used; never moves a time back."""
    connection.executemany(
        "UPDATE keys SET last_used_at = ?1 WHERE id = ?2 AND (last_used_at IS NULL OR last_used_at < ?1)",
        [(time, key_id) for key_id, time in times.items()],
    )


def record_of(row: Sequence[Any]) -> KeyRecord:
    """Raises ValueError, TypeError or KeyError if the row is not one that `insert` made."""
    values = dict(zip(COLUMNS, row, strict=False))
    scopes = frozenset(json.loads(values["scopes"]))
    if not scopes or not scopes <= frozenset(ACTIONS):
        raise ValueError("unknown scopes")
    models = values["models"]
    limits = values["limits"]
    return KeyRecord(
        **{
            **values,
            "scopes": scopes,
            "roles": frozenset(json.loads(values["roles"])),
            "models": None if models is None else tuple(json.loads(models)),
            "limits": None if limits is None else Limits.model_validate_json(limits),
            "cidr": tuple(json.loads(values["cidr"])),
        }
    )


def nobody(key_id: str) -> list[tuple[object, ...]]:
    """Rows, as `SELECT_WITH_HASHES` finds them, of a key that does not exist; no less work than others."""
    record = KeyRecord(
        id=key_id,
        name="nobody",
        tenant="default",
        owner="",
        scopes=frozenset({"read"}),
        roles=frozenset({"user"}),
        models=("*",),
        limits=Limits(rpm=1),
        priority=0,
        cidr=("10.0.0.0/8",),
        created_at=0.0,
    )
    return [(*_values(record), "", b"", None)]


def hashes_of(rows: Sequence[Sequence[Any]]) -> tuple[SecretHash, ...]:
    """Of rows of `SELECT_WITH_HASHES`."""
    return tuple(SecretHash(*row[len(COLUMNS) :]) for row in rows if row[len(COLUMNS)] is not None)


def _values(record: KeyRecord) -> tuple[object, ...]:
    columns: dict[str, object] = {name: getattr(record, name) for name in COLUMNS}
    columns["scopes"] = json.dumps(sorted(record.scopes))
    columns["roles"] = json.dumps(sorted(record.roles))
    columns["models"] = None if record.models is None else json.dumps(record.models)
    columns["limits"] = None if record.limits is None else record.limits.model_dump_json()
    columns["cidr"] = json.dumps(record.cidr)
    return tuple(columns.values())
