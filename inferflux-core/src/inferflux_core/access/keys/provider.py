"""The auth provider `api_keys`: who holds a key of this server.

form and checksum     401, the store is not asked
id -> key             of the configuration, the cache (1 s), or the store; 503 if the store cannot be read
secret                two HMACs and two comparisons, also for an id that does not exist
revoked, expired, network
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from inferflux_core.access.keys import rows as key_rows
from inferflux_core.access.keys.form import PREFIX, new_key, parse_key
from inferflux_core.access.keys.pepper import SecretHash
from inferflux_core.access.keys.records import KeyRecord, key_principal
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.keys.static import read_static_keys
from inferflux_core.client_network import parse_address
from inferflux_core.errors import AccessUnavailableError, AuthenticationError, ConfigError
from inferflux_core.identity import AuthContext, AuthProvider, Principal

logger = logging.getLogger("inferflux.access")

CACHE_TTL_S = 1.0
"""A revocation, also by another process, is in force after at most this long."""
MAX_KNOWN = 10_000
MAX_UNKNOWN = 1_000
LAST_USED_INTERVAL_S = 60.0
_FLUSH_AFTER_S = 5.0  # one write for all keys that were used meanwhile

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(slots=True)
class _Known:
    """What is known of an id, for a second.

    Attributes:
        record: of a key that does not exist, what stands for it so that the work is the same.
        read_at: seconds of the monotonic clock; never ends for keys of the configuration.
    """

    exists: bool
    record: KeyRecord
    principal: Principal
    hashes: tuple[SecretHash, ...]
    networks: tuple[_Network, ...]
    read_at: float


class ApiKeyProvider(AuthProvider):
    """Keys of the store and of the configuration.

    Attributes:
        keys: the keys of the store, for the admin API.

    Raises:
        ConfigError: pepper, store or a static key cannot be used.
    """

    def __init__(
        self,
        settings: ApiKeySettings,
        context: AuthContext,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys = open_keys(settings, context.state_dir, now=now)
        self._now = now
        self._monotonic = monotonic
        self._count = context.count
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, _Known] = OrderedDict()
        self._used: dict[str, float] = {}  # not handed to the store yet
        self._noted: dict[str, float] = {}  # of the last minute; what was read of the store may be older
        self._flush: asyncio.TimerHandle | None = None
        self._nobody = key_rows.nobody(new_key()[0])
        self.keys.on_change = self._forget
        try:
            self._static = {
                key_id: _known(True, record, (secret,), float("inf"))
                for key_id, (record, secret) in read_static_keys(settings.keys, self.keys.pepper).items()
            }
            self._refuse_twins()
        except BaseException:
            self.keys.close()
            raise

    def claims(self, credential: str) -> bool:
        return credential.startswith(PREFIX)

    def is_local(self, credential: str) -> bool:
        return True

    async def authenticate(self, credential: str, address: str | None) -> Principal:
        parsed = parse_key(credential)
        if parsed is None:
            raise AuthenticationError("malformed_key")
        known = self._static.get(parsed.id) or self._look_up(parsed.id)
        secret = self.keys.pepper.match(credential, known.hashes)
        now = self._now()
        reason = _refusal(known, secret, address, now)
        if reason is not None:
            raise AuthenticationError(reason)
        assert secret is not None
        if known.read_at != float("inf"):
            self._note_use(known.record, now)
        ends = secret.valid_until
        if ends is not None and (known.record.expires_at is None or ends < known.record.expires_at):
            return dataclasses.replace(known.principal, expires_at=ends)
        return known.principal

    async def close(self) -> None:
        """Write down what was used, and close the store."""
        if self._flush is not None:
            self._flush.cancel()
        self._write_used()
        self.keys.close()

    def _look_up(self, key_id: str) -> _Known:
        """From the cache or the store. Ids that do not exist have a cache of their own, and can push only each other out."""
        now = self._monotonic()
        for cache in (self._known, self._unknown):
            known = cache.get(key_id)
            if known is not None:
                if now - known.read_at < CACHE_TTL_S:
                    return known
                del cache[key_id]
        try:
            self._count("store_read")
            rows = self.keys.store.read(key_rows.SELECT_WITH_HASHES, (key_id,))
            # A stranger's id is decoded like one of ours, from a row that stands for it.
            known = self.keys.store.decoded(_of_rows, bool(rows), rows or self._nobody, now)
        except AccessUnavailableError:
            self._count("store_error")
            raise
        cache, most = (self._known, MAX_KNOWN) if known.exists else (self._unknown, MAX_UNKNOWN)
        cache[key_id] = known
        if len(cache) > most:
            cache.popitem(last=False)
        return known

    def _forget(self, key_id: str) -> None:
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)

    def _note_use(self, record: KeyRecord, now: float) -> None:
        written = max(record.last_used_at or 0.0, self._noted.get(record.id, 0.0))
        if now - written < LAST_USED_INTERVAL_S:
            return
        self._used[record.id] = self._noted[record.id] = now
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self._write_used)

    def _write_used(self) -> None:
        """Hand the times to the store's thread. They are lost if it cannot write: nothing depends on them."""
        self._flush = None
        used, self._used = self._used, {}
        now = self._now()
        self._noted = {key_id: time for key_id, time in self._noted.items() if now - time < LAST_USED_INTERVAL_S}
        if not used:
            return
        try:
            self.keys.store.submit(lambda connection: key_rows.used(connection, used)).add_done_callback(self._written)
        except AccessUnavailableError:
            self._count("last_used_error")

    def _written(self, done: Future[None]) -> None:
        if done.exception() is not None:
            self._count("last_used_error")

    def _refuse_twins(self) -> None:
        """A key of both the configuration and the store would outlive its revocation in the store."""
        for key_id, known in self._static.items():
            if self.keys.store.read(key_rows.SELECT_ONE, (key_id,)):
                raise ConfigError(
                    f"the static key {known.record.name!r} is also a key of the store ({key_id!r}), and revoking it there "
                    f"would not end it; remove it from the configuration, or configure a key that the store does not have"
                )


def _of_rows(exists: bool, rows: list[tuple[object, ...]], read_at: float) -> _Known:
    return _known(exists, key_rows.record_of(rows[0]), key_rows.hashes_of(rows) if exists else (), read_at)


def _known(exists: bool, record: KeyRecord, hashes: tuple[SecretHash, ...], read_at: float) -> _Known:
    networks = tuple(ipaddress.ip_network(network) for network in record.cidr)
    return _Known(exists, record, key_principal(record), hashes, networks, read_at)


def _refusal(known: _Known, secret: SecretHash | None, address: str | None, now: float) -> str | None:
    """Why a key is refused, for the audit log; None if it is good."""
    record = known.record
    if not known.exists:
        return "unknown_key"
    if secret is None:
        return "wrong_secret"
    if record.revoked_at is not None:
        return "revoked_key"
    if record.expires_at is not None and record.expires_at <= now:
        return "expired_key"
    if secret.valid_until is not None and secret.valid_until <= now:
        return "rotated_key"
    if known.networks and not _is_within(address, known.networks):
        return "wrong_address"
    return None


def _is_within(address: str | None, networks: tuple[_Network, ...]) -> bool:
    parsed = parse_address(address or "")
    return parsed is not None and any(parsed in network for network in networks)
