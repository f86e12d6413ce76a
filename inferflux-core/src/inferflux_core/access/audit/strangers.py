"""How much of the audit log somebody without a credential may fill.

Each request of a stranger is on record, up to a number a minute from one address and from all together; what comes beyond is
counted, and the count is on record when the minute is over. Without that anyone could fill the disk with 401s.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.trail import AuditTrail
from inferflux_core.client_network import client_network

PER_ADDRESS = 60
"""Records a minute from one address (IPv6: from one /64)."""

TOGETHER = 600
"""Records a minute from all addresses."""

_MINUTE = 60.0
_MOST_ADDRESSES = 1000  # that are told apart in the summary; the rest are counted together


class Strangers:
    """The budget of one server. Call it in the event loop."""

    def __init__(self, audit: AuditTrail, on_suppressed: Callable[[], None]) -> None:
        """Args:
        on_suppressed: called for each record that is only counted.
        """
        self._audit = audit
        self._on_suppressed = on_suppressed
        self._written: Counter[str] = Counter()  # no longer than TOGETHER
        self._total = 0
        self._suppressed: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def may_write(self, address: str | None) -> bool:
        """Whether a record about this address goes to the log; if not, it is counted."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_MINUTE, self.flush)
        network = client_network(address) or "unknown"
        if self._written[network] < PER_ADDRESS and self._total < TOGETHER:
            self._written[network] += 1
            self._total += 1
            return True
        known = network in self._suppressed or len(self._suppressed) < _MOST_ADDRESSES
        self._suppressed[network if known else "others"] += 1
        self._on_suppressed()
        return False

    def flush(self) -> None:
        """End the minute: put on record what was only counted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for network, count in self._suppressed.items():
            self._audit.record_soon(AuditEvent(event="requests.suppressed", address=network, fields={"records": count}))
        self._written.clear()
        self._total = 0
        self._suppressed.clear()
