"""The `Host` header: which names this server answers to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from inferflux_core.errors import ConfigError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?", re.ASCII)
_PATTERN = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]", re.ASCII)


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

    A web page may point its own domain name at this server's address and then read the replies as if they were its own
    (DNS rebinding). The browser still sends the page's name as `Host`. So a server bound to loopback answers to loopback
    names only, and one with `server.allowed_hosts` to these names. Its own address, as the client connected to it, is
    always right: no page can make that its name. Bound elsewhere and with no names set, any well-formed name passes.
    """

    def __init__(self, bound_to: str, allowed_hosts: Iterable[str] = ()) -> None:
        """Args:
            bound_to: `server.host`.
            allowed_hosts: names, or `*.example.com` for every name below `example.com`.

        Raises:
            ConfigError: one of them is no such name.
        """
        self._loopback_only = is_loopback(bound_to)
        self._names: set[str] = set()
        self._suffixes: list[str] = []
        for pattern in allowed_hosts:
            name = pattern.lower().rstrip(".")
            if _PATTERN.fullmatch(name) is None:
                raise ConfigError(
                    f"server.allowed_hosts: {pattern!r} is not a host name; write it without scheme, port and path, such as "
                    "'llm.example.com', or '*.example.com' for all names below example.com"
                )
            if name.startswith("*."):
                self._suffixes.append(name[1:])
            else:
                self._names.add(name)
        self._any_name = not self._loopback_only and not self._names and not self._suffixes

    def problem(self, values: list[bytes], *, http_version: str = "1.0", address: str | None = None) -> tuple[int, str] | None:
        """Status and message of the refusal, or None. After a 400 the connection shall be closed: the client's idea of where
        a request ends may not be ours.

        Args:
            values: the values of all `Host` headers of a request.
            http_version: from the ASGI scope; HTTP/1.0 needs no `Host`.
            address: this server's own, to which the client connected; None if it is not known.
        """
        if len(values) > 1:
            return 400, "A request must have exactly one Host header (RFC 9112, section 3.2)."
        if not values:
            if self._any_name and http_version == "1.0":
                return None  # a browser always sends one
            return 400, "A Host header is required, such as 'localhost'."
        match = _HOST.fullmatch(values[0].decode("latin-1"))
        if match is None:
            return 400, "The Host header is malformed; it must be a name or an address with an optional port."
        if self._any_name or self._answers_to(match[1].lower(), address):
            return None
        if self._loopback_only and not self._names and not self._suffixes:
            return 421, (
                f"This server listens on loopback only and does not answer to the name {match[1][:100]!r}; use localhost "
                "or 127.0.0.1, or set server.host to the address it shall be reached at."
            )
        return 421, (
            f"This server does not answer to the name {match[1][:100]!r}; use a name that is in server.allowed_hosts, or add "
            "this one there."
        )

    def _answers_to(self, name: str, address: str | None) -> bool:
        if is_loopback(name):
            # Of a server that is reached over the network it is not the name; somebody in between wrote it.
            return self._loopback_only or (address is not None and is_loopback(address))
        if address is not None and name.strip("[]") == address.lower():
            return True
        name = name.removesuffix(".")
        return name in self._names or any(name.endswith(suffix) and name != suffix for suffix in self._suffixes)
