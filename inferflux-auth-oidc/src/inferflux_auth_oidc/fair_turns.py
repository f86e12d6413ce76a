"""Turns at something slow that strangers compete for: one client with many wishes must not hold up another with one."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inferflux_auth_oidc.refusal import Unavailable


class FairTurns:
    """A number of turns at a time, a few of them for one client. Clients that wait are served in rotation, each in its order.

    Args:
        turns: at a time, of all clients together.
        of_client: at a time, of one client; fewer than `turns`, so that one client never has them all.
        waiting_of_client: that may wait, of one client.
        waiting: that may wait, of all clients together.
    """

    def __init__(self, turns: int, of_client: int, *, waiting_of_client: int, waiting: int) -> None:
        self._free = turns
        self._of_client = of_client
        self._max_waiting_of_client = waiting_of_client
        self._max_waiting = waiting
        self._taken: Counter[str] = Counter()
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # of clients that wait, the next one first

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def turn(self, client: str, patience: float) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Args:
            client: whose wish this is.
            patience: seconds to wait at most.

        Raises:
            Unavailable: it took too long, or too many wait already.
        """
        await self._take(client, patience)
        try:
            yield
        finally:
            self._give_back(client)

    async def _take(self, client: str, patience: float) -> None:
        if self._free and self._taken[client] < self._of_client:
            self._free -= 1
            self._taken[client] += 1
            return
        queue = self._queues.get(client, ())
        if len(queue) >= self._max_waiting_of_client or self.waiting >= self._max_waiting:
            raise Unavailable(1.0)
        called = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(called)
        try:
            await asyncio.wait((called,), timeout=patience)
        except asyncio.CancelledError:
            if called.done():
                self._give_back(client)
            else:
                self._leave_queue(client, called)
            raise
        if not called.done():
            self._leave_queue(client, called)
            raise Unavailable(1.0)

    def _leave_queue(self, client: str, called: asyncio.Future[None]) -> None:
        self._queues[client].remove(called)
        if not self._queues[client]:
            del self._queues[client]

    def _give_back(self, client: str) -> None:
        self._free += 1
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
        # At most one can go on: everybody else who could have, has.
        ready = next((waits for waits in self._queues if self._taken[waits] < self._of_client), None)
        if ready is None:
            return
        called = self._queues[ready].popleft()
        if self._queues[ready]:
            self._queues.move_to_end(ready)
        else:
            del self._queues[ready]
        self._free -= 1
        self._taken[ready] += 1
        called.set_result(None)
