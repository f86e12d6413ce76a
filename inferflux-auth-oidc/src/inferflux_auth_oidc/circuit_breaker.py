"""A circuit breaker: leaves a failing service alone for a while, and waiting clients with it."""

from __future__ import annotations

from collections.abc import Callable

_OPENS_AFTER = 5  # failures in a row
_OPEN_FOR = 10.0  # seconds


class CircuitBreaker:
    """Closed: calls go through. Open, after five failures in a row: none does for 10 s. Then one does, and decides."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._failures = 0
        self._open_until = float("-inf")
        self._probing = False

    def enter(self) -> float:
        """Ask to make a call. Returns 0 if it may be made, and then `leave` must follow; else seconds until the next chance."""
        if self._failures < _OPENS_AFTER:
            return 0.0
        now = self._monotonic()
        if now < self._open_until:
            return self._open_until - now
        if self._probing:
            return 1.0
        self._probing = True
        return 0.0

    def leave(self, ok: bool | None) -> bool:
        """Say how the call ended; None if it was given up and says nothing. Returns whether this opened the circuit."""
        self._probing = False
        if ok is None:
            return False
        if ok:
            self._failures = 0
            return False
        self._failures += 1
        if self._failures < _OPENS_AFTER:
            return False
        self._open_until = self._monotonic() + _OPEN_FOR
        return True
