"""A Lua script in Redis: one round trip a call, never long, and an end to asking while Redis cannot be reached."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inferflux_core.errors import ConfigError

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger("inferflux.limits")

LOG_SECONDS = 10.0
_CONNECTIONS = 16


class StoreDown(Exception):
    """Redis did not answer, or not with a result.

    Attributes:
        asked: whether it was asked at all; then what was asked for may have been done.
    """

    def __init__(self, *, asked: bool) -> None:
        super().__init__()
        self.asked = asked


class RedisScript:
    """Runs a script, and knows whether Redis can be used at all.

    After a failure nothing is asked for `retry_seconds`; then one call tries while the others still fail at once. One log
    line in ten seconds says that Redis cannot be used.
    """

    def __init__(
        self,
        url: str,
        text: str,
        *,
        on_event: Callable[[str], None],
        meanwhile: str,
        timeout: float = 0.2,
        retry_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
            on_event: told `store_error` for each call that failed, and `store_recovered`.
            meanwhile: what is done while Redis cannot be used, for the log.
            timeout: in seconds, to connect; an answer may take twice as long, with all that is before it.

        Raises:
            ConfigError: the extra `redis` is not installed, or the URL is not one of Redis.
        """
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError as error:
            raise ConfigError(
                "limits.store is 'redis', and the Redis client is not installed: pip install 'inferflux-core[redis]'"
            ) from error
        try:
            # RESP2: one round trip less to connect. No retries: a script that may have run is not run twice. No socket timeout:
            # the client would write under `asyncio.wait_for`, which in Python 3.11 may swallow that a request was cancelled.
            self._client: Redis = Redis.from_url(
                url,
                protocol=2,
                socket_timeout=None,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),
                max_connections=4 * _CONNECTIONS,
            )
        except (ValueError, RedisError):
            # The error may quote the URL, which may hold a password.
            raise ConfigError(
                "limits.redis_url is not a URL of Redis: write redis://host:port/db, rediss://... for TLS, or unix:///path"
            ) from None
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._on_event = on_event
        self._meanwhile = meanwhile
        self._deadline = 2 * timeout
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._calls = asyncio.Semaphore(_CONNECTIONS)
        self._ask_again_at: float | None = None  # None: Redis works
        self._probing = False  # a call tries whether Redis works again
        self._logged_at: float | None = None
        self._unlogged = 0
        self._to_log_recovery = False
        self._closed = False

    async def run(self, keys: Sequence[str], args: Sequence[str | int | float]) -> list[Any]:
        """The script's reply.

        Raises:
            StoreDown: there is none.
        """
        probe = self._may_ask()
        try:
            async with self._calls:
                if self._ask_again_at is not None and not probe:
                    raise StoreDown(asked=False)  # it waited behind calls that failed, and is not to fail slowly as well
                async with asyncio.timeout(self._deadline):
                    reply = await self._evaluate(keys, args)
        except StoreDown:
            raise
        except Exception as error:  # whatever the client library raises when a connection breaks
            await self._failed(error)
            raise StoreDown(asked=True) from None
        finally:
            if probe:
                self._probing = False
        self._worked()
        return reply

    async def close(self) -> None:
        """Close all connections. Nothing is asked any more."""
        self._closed = True
        await self._client.aclose()

    async def _evaluate(self, keys: Sequence[str], args: Sequence[str | int | float]) -> list[Any]:
        from redis.exceptions import NoScriptError

        try:
            reply = await self._client.evalsha(self._sha, len(keys), *keys, *args)
        except NoScriptError:
            # New to this server, or it was restarted. EVAL loads the script as well.
            reply = await self._client.eval(self._text, len(keys), *keys, *args)
        return list(reply)

    def _may_ask(self) -> bool:
        """Whether this call is the one that tries if Redis works again. Raises StoreDown if it is not to be asked now."""
        if self._closed:
            raise StoreDown(asked=False)
        if self._ask_again_at is None:
            return False
        if self._probing or self._clock() < self._ask_again_at:
            raise StoreDown(asked=False)
        self._probing = True
        return True

    async def _failed(self, error: Exception) -> None:
        now = self._clock()
        self._ask_again_at = now + self._retry_seconds
        self._on_event("store_error")
        if self._logged_at is not None and now - self._logged_at < LOG_SECONDS:
            self._unlogged += 1
        else:
            more = f", {self._unlogged} more failures since the last such line" if self._unlogged else ""
            logger.warning(
                "Redis cannot be used for limits (%s: %s)%s; %s", type(error).__name__, str(error)[:300], more, self._meanwhile
            )
            self._logged_at, self._unlogged = now, 0
            self._to_log_recovery = True
        if type(error).__name__ == "ReadOnlyError":
            # The connections lead to a server that is no master any more; new ones may find the one that is.
            with contextlib.suppress(Exception):
                await self._client.connection_pool.disconnect(inuse_connections=False)

    def _worked(self) -> None:
        if self._ask_again_at is None:
            return
        self._ask_again_at = None
        self._on_event("store_recovered")
        if self._to_log_recovery:
            logger.info("Redis can be used for limits again")
            self._to_log_recovery = False
