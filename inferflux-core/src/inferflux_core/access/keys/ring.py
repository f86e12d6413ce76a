"""Making, changing, rotating and revoking the keys of the store: what the admin API and the command line use."""

from __future__ import annotations

import dataclasses
import hmac
import math
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from inferflux_core.access.keys import rows as key_rows
from inferflux_core.access.keys.form import is_key_id, new_key
from inferflux_core.access.keys.pepper import Pepper, load_pepper
from inferflux_core.access.keys.records import KeyChange, KeyRecord, NewKey
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.store import DEFAULT_STORE, AccessStore
from inferflux_core.errors import (
    AccessUnavailableError,
    ConfigError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PreconditionFailedError,
)

MAX_OVERLAP_S = 90 * 86_400.0

T = TypeVar("T")


class KeyRing:
    """The keys of one store. Every method raises AccessUnavailableError while the store cannot be used.

    Args:
        env: word in new keys, `ifx_<env>_...`.
        now: Unix seconds.

    Raises:
        ConfigError: the store's keys were made with another pepper of the same name.
    """

    def __init__(self, store: AccessStore, pepper: Pepper, *, env: str = "live", now: Callable[[], float] = time.time) -> None:
        self.store = store
        self.pepper = pepper
        self.env = env
        self.on_change: Callable[[str], None] = lambda key_id: None
        self._now = now
        try:
            store.submit(self._recognise_peppers).result()
        except AccessUnavailableError as error:
            raise ConfigError(
                f"the access store {str(store.path)!r} cannot be written; see that it is not locked, and that the disk has room"
            ) from error

    async def create(self, new: NewKey) -> tuple[KeyRecord, str]:
        """Make a key.

        Returns:
            Its record, and the whole key, which is kept nowhere: to be shown once.

        Raises:
            InvalidRequestError: it would have expired already.
        """
        now = self._now()
        key_id, key = new_key(self.env)
        secret = self.pepper.hash(key)
        expires_at = _expiry(new.expires_at, new.expires_in_s, now)
        record = KeyRecord.of(new, key_id, created_at=now, expires_at=expires_at)

        def insert(connection: sqlite3.Connection) -> None:
            key_rows.insert(connection, record)
            key_rows.add_hash(connection, key_id, secret)

        await self.store.write(insert)
        self.on_change(key_id)
        return record, key

    async def list(self) -> list[KeyRecord]:
        """All keys, revoked and expired ones too, the oldest first."""

        def look(connection: sqlite3.Connection) -> list[KeyRecord]:
            return [self.store.decoded(key_rows.record_of, row) for row in connection.execute(key_rows.SELECT_ALL)]

        return await self.store.query(look)

    async def get(self, key_id: str) -> KeyRecord:
        """Raises NotFoundError if there is none."""
        rows = self.store.read(key_rows.SELECT_ONE, (key_id,)) if is_key_id(key_id) else ()
        if not rows:
            raise _not_found(key_id)
        return self.store.decoded(key_rows.record_of, rows[0])

    async def update(self, key_id: str, change: KeyChange, expected_version: int | None) -> KeyRecord:
        """Change what `change` names.

        Args:
            expected_version: the version it must have now; None takes any, here and in `rotate` and `revoke`.

        Raises:
            NotFoundError: there is no such key.
            PreconditionFailedError: it has another version than the one expected.
            ConflictError: it is revoked.
            InvalidRequestError: it would have expired already.
        """
        now = self._now()
        changes = {name: getattr(change, name) for name in change.model_fields_set if not name.startswith("expires_")}
        if not change.model_fields_set.isdisjoint({"expires_at", "expires_in_s"}):
            changes["expires_at"] = _expiry(change.expires_at, change.expires_in_s, now)

        def apply(connection: sqlite3.Connection) -> KeyRecord:
            record = self._current(connection, key_id, expected_version)
            changed = dataclasses.replace(record, version=record.version + 1, **changes)
            key_rows.replace(connection, changed)
            return changed

        return await self._write(key_id, apply)

    async def rotate(self, key_id: str, overlap_s: float, expected_version: int | None) -> tuple[KeyRecord, str]:
        """Give a key a new secret under the same id.

        The secret it had stays valid for `overlap_s` seconds more. Of secrets before that one none does, even if the
        overlap of the last rotation is not over: at most two are valid at any time.

        Returns:
            Its record, and the whole new key, to be shown once.

        Raises:
            InvalidRequestError: the overlap is not between 0 and 90 days.
            NotFoundError, PreconditionFailedError, ConflictError: as `update`; also if the key has expired.
        """
        if not math.isfinite(overlap_s) or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidRequestError(
                f"overlap_s is {overlap_s!r}; it must be from 0 to {MAX_OVERLAP_S:.0f} seconds", param="overlap_s"
            )
        now = self._now()

        def apply(connection: sqlite3.Connection) -> tuple[KeyRecord, str]:
            record = self._current(connection, key_id, expected_version)
            if record.expires_at is not None and record.expires_at <= now:
                raise ConflictError(f"The key {key_id!r} has expired; set another expires_at first, or make a new key.")
            _, key = new_key(self.env, key_id)
            key_rows.end_hashes(connection, key_id, now + overlap_s)
            key_rows.add_hash(connection, key_id, self.pepper.hash(key))
            changed = dataclasses.replace(record, rotated_at=now, version=record.version + 1)
            key_rows.replace(connection, changed)
            return changed, key

        return await self._write(key_id, apply)

    async def revoke(self, key_id: str, expected_version: int | None) -> KeyRecord:
        """Make a key invalid for ever. One that is revoked already stays as it is, whatever version is expected.

        Raises:
            NotFoundError, PreconditionFailedError: as `update`.
        """
        now = self._now()

        def apply(connection: sqlite3.Connection) -> KeyRecord:
            record = self._find(connection, key_id)
            if record.revoked_at is not None:
                return record
            record = self._current(connection, key_id, expected_version)
            changed = dataclasses.replace(record, revoked_at=now, version=record.version + 1)
            key_rows.replace(connection, changed)
            return changed

        return await self._write(key_id, apply)

    def close(self) -> None:
        self.store.close()

    async def _write(self, key_id: str, apply: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await self.store.write(apply)
        finally:
            self.on_change(key_id)  # also when the caller is cancelled: the write may have happened

    def _find(self, connection: sqlite3.Connection, key_id: str) -> KeyRecord:
        row = connection.execute(key_rows.SELECT_ONE, (key_id,)).fetchone() if is_key_id(key_id) else None
        if row is None:
            raise _not_found(key_id)
        return self.store.decoded(key_rows.record_of, row)

    def _current(self, connection: sqlite3.Connection, key_id: str, expected_version: int | None) -> KeyRecord:
        record = self._find(connection, key_id)
        if expected_version is not None and record.version != expected_version:
            raise PreconditionFailedError(
                f"The key {key_id!r} has version {record.version}, not {expected_version}: somebody else changed it; "
                f"read it again."
            )
        if record.revoked_at is not None:
            raise ConflictError(f"The key {key_id!r} is revoked and stays so; make a new key.")
        return record

    def _recognise_peppers(self, connection: sqlite3.Connection) -> None:
        """A lost pepper would otherwise show as "no key works any more"."""
        for pepper_id in self.pepper.ids:
            value = self.pepper.check_value(pepper_id)
            connection.execute("INSERT OR IGNORE INTO peppers (id, check_value) VALUES (?, ?)", (pepper_id, value))
            (known,) = connection.execute("SELECT check_value FROM peppers WHERE id = ?", (pepper_id,)).fetchone()
            if not hmac.compare_digest(known, value):
                raise ConfigError(
                    f"the pepper {pepper_id!r} is not the one that keys in {str(self.store.path)!r} were made with; "
                    f"restore that pepper, or set another pepper_id and rotate every key"
                )


def open_keys(settings: ApiKeySettings, state_dir: Path, *, now: Callable[[], float] = time.time) -> KeyRing:
    """The keys of this machine, for a server or for the command line on its host; `close` it after use.

    Raises:
        ConfigError: pepper or store cannot be used.
    """
    pepper = load_pepper(settings, state_dir)
    store = AccessStore(settings.store or state_dir / DEFAULT_STORE)
    try:
        return KeyRing(store, pepper, env=settings.key_env, now=now)
    except BaseException:
        store.close()
        raise


def _expiry(at: datetime | None, in_s: float | None, now: float) -> float | None:
    if in_s is not None:
        return now + in_s
    if at is None:
        return None
    if at.timestamp() <= now:
        raise InvalidRequestError(f"expires_at is {at.isoformat()!r}, which is past; name a later time", param="expires_at")
    return at.timestamp()


def _not_found(key_id: str) -> NotFoundError:
    return NotFoundError(f"There is no key {key_id[:64]!r}; list the keys to see which there are.")
