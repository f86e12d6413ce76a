"""The `Host` header: which names a server on loopback answers to."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (IPv6 with or without brackets) means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HostCheck:
    """Refuses foreign `Host` headers.

    A web page may point its own domain name at 127.0.0.1 and then read this server's replies as if they were its own
    (DNS rebinding). The browser still sends the page's name as `Host`, so a server bound to loopback answers to
    loopback names only. Bound elsewhere it may have any name, and any one well-formed header passes.
    """

    def __init__(self, bound_to: str) -> None:
        self._loopback_only = is_loopback(bound_to)

    def problem(self, values: list[bytes]) -> tuple[int, str] | None:
        """Status and message of the refusal, or None.

        Args:
            values: the values of all `Host` headers of a request.
        """
        if len(values) > 1:
            return 400, "A request must have exactly one Host header (RFC 9112, section 3.2)."
        if not values:
            # HTTP/1.0 needs none; a browser always sends one, so only the loopback rule can be at stake.
            return (400, "A Host header is required, such as 'localhost'.") if self._loopback_only else None
        match = _HOST.fullmatch(values[0].decode("latin-1"))
        if match is None:
            return 400, "The Host header is malformed; it must be a name or an address with an optional port."
        if self._loopback_only and not is_loopback(match[1]):
            return 421, (
                f"This server listens on loopback only and does not answer to the name {match[1][:100]!r}; use localhost "
                "or 127.0.0.1, or set server.host to the address it shall be reached at."
            )
        return None
