"""Failed authentications of one client address: after too many in a minute its credentials are not looked at any more."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from inferflux_core.access.limit_usage import MINUTE, TOLERANCE
from inferflux_core.errors import RateLimitError

MAX_ADDRESSES = 65_536


class FailureLimit:
    """Counts failures by GCRA: `per_minute` may come at once, and one more each time that one has drained.

    An IPv6 client has a whole /64 to choose addresses from; they count as one. Clients without an address (a Unix socket)
    count as one as well. Memory is bounded: the address that failed least recently is forgotten first. To be forgotten an
    attacker needs `MAX_ADDRESSES` others, each of which has its own failures to spend anyway.
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
        level, _ = self._level(_network(address))
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
        network = _network(address)
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


def _network(address: str | None) -> str:
    """What counts as one client: an IPv4 address, also one mapped into IPv6, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(int(parsed) >> 64)
    return str(parsed)
