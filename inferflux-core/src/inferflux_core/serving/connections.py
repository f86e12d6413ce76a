"""The open connections of a server: how many there are in all and from each client, and what is said to those refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from inferflux_core.client_network import client_network
from inferflux_core.serving.client_address import TrustedProxies
from inferflux_core.serving.error_responses import error_body
from inferflux_core.settings import ServerSettings

access_logger = logging.getLogger("inferflux.access")

MAX_LINGERING_REFUSALS = 64
"""Refused connections that are kept for a moment so that the client can read why; further ones are closed at once."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The last words to a client whose request never became one; the connection ends with them.

    Attributes:
        code: `error.code` of the body, and the reason in metrics and log.
        retry_after: seconds, or None.
    """

    status: int
    code: str
    message: str
    retry_after: int | None = None

    def response(self, date: list[tuple[bytes, bytes]]) -> bytes:
        """The whole reply as it goes over the wire.

        Args:
            date: headers that every reply of the server has.
        """
        body = error_body(self.message, status=self.status, code=self.code)
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}".encode()]
        lines += [name + b": " + value for name, value in date]
        lines += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        if self.retry_after is not None:
            lines.append(b"retry-after: %d" % self.retry_after)
        return b"\r\n".join([*lines, b"", body])


_SERVER_FULL = Refusal(503, "too_many_connections", "The server has as many connections as it takes; retry later.", 1)
_CLIENT_FULL = Refusal(
    429, "too_many_connections", "Your address has as many connections as it may have; close some, or reuse them.", 1
)


class Connections:
    """Counts them. One object for all connections of a server; used in its event loop only.

    Attributes:
        settings: the limits that connections live under.
    """

    def __init__(self, settings: ServerSettings, on_refusal: Callable[[int, str], None]) -> None:
        """Args:
            on_refusal: told status and code of everything refused at this level; for the metrics.

        Raises:
            ConfigError: `server.trusted_proxies` is malformed.
        """
        self.settings = settings
        self._on_refusal = on_refusal
        self._trusted = TrustedProxies(settings.trusted_proxies)
        self._total = 0
        self._by_client: Counter[str] = Counter()
        self._lingering = 0

    def __len__(self) -> int:
        return self._total

    def admit(self, address: str | None) -> Refusal | None:
        """Count a new connection in and return None, or leave it out and return why."""
        if self._total >= self.settings.max_connections:
            return _SERVER_FULL
        client = client_network(address)
        if self._by_client[client] >= self.settings.max_connections_per_client and not self._is_proxy(address):
            return _CLIENT_FULL
        self._total += 1
        self._by_client[client] += 1
        return None

    def release(self, address: str | None) -> None:
        """Count out one that was admitted."""
        self._total -= 1
        client = client_network(address)
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def linger(self) -> bool:
        """Whether one more refused connection may stay for a moment; if so, `linger_done` must follow."""
        if self._lingering >= MAX_LINGERING_REFUSALS:
            return False
        self._lingering += 1
        return True

    def linger_done(self) -> None:
        """One of them is gone."""
        self._lingering -= 1

    def refused(self, refusal: Refusal, address: str | None) -> None:
        """Count and log a refusal."""
        self._on_refusal(refusal.status, refusal.code)
        if access_logger.isEnabledFor(logging.INFO):
            fields = {"status": refusal.status, "error": refusal.code, "client": address}
            access_logger.info("refused", extra={"fields": fields})

    def _is_proxy(self, address: str | None) -> bool:
        return address is not None and address in self._trusted
