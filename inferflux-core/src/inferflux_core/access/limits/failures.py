"""Failed authentications of one client address: after too many in a minute its credentials are not looked at any more."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from inferflux_core.access.limits.usage import MINUTE, TOLERANCE
from inferflux_core.client_network import client_network
from inferflux_core.errors import RateLimitError

MAX_ADDRESSES = 65_536


class FailureLimit:
    """Counts failures by GCRA: `per_minute` may come at once, and one more each time that one has drained.

    Addresses that one client may choose from count as one, see `client_network`. Memory is bounded: the address that failed
    least recently is forgotten first. To be forgotten an attacker needs `MAX_ADDRESSES` others, each of which has its own
    failures to spend anyway.
    """

    def __init__(
        self, per_minute: int, *, max_addresses: int = MAX_ADDRESSES, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute = per_minute
        self._max_addresses = max_addresses
        self._monotonic = monotonic
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level and its time

    def __len__(self) -> int:
        """How many addresses it remembers."""
        return len(self._failures)

    def check(self, address: str | None) -> None:
        """Whether a credential from this address may be looked at.

        Raises:
            RateLimitError: too many failures.
        """
        level, _ = self._level(client_network(address))
        over = level + 1 - self._per_minute
        if over > TOLERANCE:
            wait = over * MINUTE / self._per_minute
            raise RateLimitError(
                "Too many failed authentications from this address. Wait, and retry with a valid credential.",
                kind="failures",
                retry_after=wait,
            )

    def failed(self, address: str | None) -> None:
        """Count a failure. Those that were under way when the limit was reached count too, up to twice the limit."""
        network = client_network(address)
        level, now = self._level(network)
        self._failures[network] = (min(level + 1, 2.0 * self._per_minute), now)
        self._failures.move_to_end(network)
        if len(self._failures) > self._max_addresses:
            self._failures.popitem(last=False)

    def _level(self, network: str) -> tuple[float, float]:
        """The failures that have not drained yet, and the time that is true at."""
        now = self._monotonic()
        level, at = self._failures.get(network, (0.0, now))
        return max(0.0, level - max(0.0, now - at) * self._per_minute / MINUTE), now
