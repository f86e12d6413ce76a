"""The signing keys of one issuer, fetched when needed and kept while it cannot be reached.

     fetched          80 % of TTL            TTL                     TTL + 1 h
        |---- fresh -----|---- fresh -----------|------ last good -------|------ none
                          refresh in background   the first token waits   503
                          at the next token       for a fetch; if that
                                                  fails, they still serve

An unknown `kid` fetches too, at most every 30 s: after a rotation the first token with the new key finds it, and a flood of
invented ones does not reach the issuer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence

from joserfc.jwk import Key

from inferflux_auth_oidc.discovery import Discovery
from inferflux_auth_oidc.issuer_http import FetchError, IssuerHttp
from inferflux_auth_oidc.refusal import Refusal, Unavailable
from inferflux_auth_oidc.settings import IssuerSettings
from inferflux_auth_oidc.signing_keys import read_key_set

logger = logging.getLogger("inferflux.oidc")

_TTL = 300.0  # seconds, unless Cache-Control says otherwise,
_TTL_MIN, _TTL_MAX = 60.0, 3600.0  # within these
_REFRESH_AT = 0.8  # of the TTL
_LAST_GOOD_FOR = 3600.0  # seconds after the TTL
_FORCED_EVERY = 30.0  # seconds between fetches for an unknown kid
_RETRY_FIRST, _RETRY_MAX = 1.0, 30.0  # seconds between tries while the issuer fails

_MAX_AGE = re.compile(r"(?:^|[\s,])max-age\s*=\s*\"?(\d{1,9})")
_NOT_STORED = re.compile(r"(?:^|[\s,])no-(?:store|cache)(?:$|[\s,=])")


class KeyCache:
    """Keys of one issuer by `kid`. All tokens that wait for keys wait for the same fetch."""

    def __init__(
        self,
        issuer: IssuerSettings,
        http: IssuerHttp,
        discovery: Discovery,
        *,
        monotonic: Callable[[], float],
        count: Callable[[str], None],
    ) -> None:
        self._issuer = issuer
        self._http = http
        self._discovery = discovery
        self._monotonic = monotonic
        self._count = count
        self._keys: dict[str, list[Key]] = {}
        self._fetch: asyncio.Task[None] | None = None
        self._fetches = 0  # how often keys came
        never = float("-inf")
        self._refresh_at = self._fresh_until = self._usable_until = never
        self._forced_at = self._retry_at = never
        self._failures = 0

    async def find(self, key_id: str) -> Sequence[Key]:
        """The keys with this `kid`.

        Raises:
            Refusal: `token_key`, the issuer has no such key.
            Unavailable: it cannot be found out now.
        """
        fetches = self._fetches
        await self._ensure()
        if (keys := self._keys.get(key_id)) is not None:
            return keys
        now = self._monotonic()
        if self._fetches != fetches:
            self._forced_at = now  # what was just fetched does not have it
        elif self._fetch is not None or (now >= self._forced_at + _FORCED_EVERY and now >= self._retry_at):
            if self._fetch is None:
                self._forced_at = now
                self._count("keys_forced")
            await self._join()
            if (keys := self._keys.get(key_id)) is not None:
                return keys
        if self._failures:
            # The issuer may have rotated: that this key is not its own cannot be said without asking.
            raise Unavailable(self._retry_at - self._monotonic())
        raise Refusal("token_key")

    async def refresh(self) -> bool:
        """Fetch the keys now; whether that worked."""
        await self._join()
        return self._failures == 0

    async def close(self) -> None:
        """End a fetch that is under way."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)

    async def _ensure(self) -> None:
        now = self._monotonic()
        if now < self._refresh_at:
            return
        may_try = now >= self._retry_at or self._fetch is not None
        if now < self._fresh_until or (self._failures and now < self._usable_until):
            if may_try:
                self._begin()
            return
        if may_try:
            await self._join()
        if self._monotonic() >= self._usable_until:
            self._keys = {}
            raise Unavailable(self._retry_at - self._monotonic())

    def _begin(self) -> asyncio.Task[None]:
        if self._fetch is None:
            self._fetch = asyncio.create_task(self._run(), name="inferflux-oidc-keys")
        return self._fetch

    async def _join(self) -> None:
        # Shielded: a client that goes away must not end the fetch that others wait for.
        await asyncio.shield(self._begin())

    async def _run(self) -> None:
        """One fetch. Ends with new times, whatever happens; raises nothing but cancellation."""
        try:
            url = self._issuer.jwks_uri or await self._discovery.endpoint("jwks_uri")
            reply = await self._http.get(url)
            keys = read_key_set(reply.body)
        except (FetchError, ValueError) as error:
            self._failed(str(error))
        except Exception as error:
            self._failed(type(error).__name__)
        else:
            self._succeeded(keys, _ttl(reply.cache_control))
        finally:
            self._fetch = None

    def _succeeded(self, keys: dict[str, list[Key]], ttl: float) -> None:
        now = self._monotonic()
        if self._failures:
            logger.info("the keys of an issuer are there again", extra={"fields": {"issuer": self._issuer.issuer}})
        self._keys = keys
        self._fetches += 1
        self._failures = 0
        self._retry_at = now
        self._refresh_at = now + _REFRESH_AT * ttl
        self._fresh_until = now + ttl
        self._usable_until = now + ttl + _LAST_GOOD_FOR
        self._count("keys_fetched")

    def _failed(self, reason: str) -> None:
        now = self._monotonic()
        self._discovery.forget()
        pause = min(_RETRY_MAX, _RETRY_FIRST * 2 ** min(self._failures, 10))
        self._failures += 1
        self._retry_at = now + pause
        self._count("keys_failed")
        fields = {"issuer": self._issuer.issuer, "reason": reason, "retry_in_s": pause, "last_good": now < self._usable_until}
        logger.warning("the keys of an issuer could not be fetched", extra={"fields": fields})


def _ttl(cache_control: str) -> float:
    text = cache_control.lower()
    if _NOT_STORED.search(text) is not None:
        return _TTL_MIN
    age = _MAX_AGE.search(text)
    return _TTL if age is None else min(_TTL_MAX, max(_TTL_MIN, float(age[1])))
