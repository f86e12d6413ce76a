"""Mistakes of ours in what the event loop calls on a connection.

asyncio only logs what such a callback raises: the connection would stay open, read by nobody and ended by no deadline.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

logger = logging.getLogger("inferflux.server")


class Abortable(Protocol):
    """A connection that can be ended at once."""

    def abort(self) -> None: ...


_P = ParamSpec("_P")
_C = TypeVar("_C", bound=Abortable)


def aborts(callback: Callable[Concatenate[_C, _P], None]) -> Callable[Concatenate[_C, _P], None]:
    """A callback whose mistakes are logged and end the connection."""

    @functools.wraps(callback)
    def guarded(self: _C, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            callback(self, *args, **kwargs)
        except Exception as error:
            log_fault(callback.__name__, error)
            self.abort()

    return guarded


def log_fault(callback: str, error: BaseException) -> None:
    """The server's formatters leave out the messages of exceptions, which may quote the client."""
    logger.error("a connection was ended by a mistake of the server", extra={"fields": {"callback": callback}}, exc_info=error)
