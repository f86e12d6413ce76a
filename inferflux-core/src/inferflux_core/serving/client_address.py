"""The address of a client: the one at the other end of the connection, or behind a trusted proxy the one it reports."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Literal

from starlette.types import Scope

from inferflux_core.client_network import Address, parse_address
from inferflux_core.errors import ConfigError

AddressSource = Literal["peer", "forwarded"]

# Some proxies add the port: `192.0.2.1:4711`, `[2001:db8::1]:4711`, `"[2001:db8::1]"`.
_WITH_PORT = re.compile(r'"?(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::\d{1,5})?"?', re.ASCII)


class TrustedProxies:
    """Addresses whose `X-Forwarded-For` is believed."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        """Args:
            trusted: addresses or networks, `server.trusted_proxies`.

        Raises:
            ConfigError: one of them is neither.
        """
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for text in trusted:
            try:
                self._networks.append(ipaddress.ip_network(text))
            except ValueError as error:
                raise ConfigError(
                    f"server.trusted_proxies: {text!r} is not an address or a network: {error}; write one such as '10.0.0.7' "
                    "or '10.0.0.0/24', names are not looked up"
                ) from None

    def __contains__(self, address: str) -> bool:
        parsed = _parse(address)
        return parsed is not None and self._trusts(parsed)

    def client(self, peer: str, forwarded_for: Iterable[bytes]) -> tuple[str, AddressSource]:
        """Who is behind a connection.

        Each proxy appends the address it was called from, so the list is believed from its right end, as long as it is a
        trusted proxy that speaks. Whatever stands further left a client may have written itself.

        Args:
            peer: address at the other end of the connection.
            forwarded_for: values of all `X-Forwarded-For` headers in their order.

        Returns:
            The rightmost address that is no trusted proxy, or, if something unreadable comes first, the last proxy before it.
        """
        client = _parse(peer)
        if client is None:
            return peer, "peer"
        hops = [hop for value in forwarded_for for hop in value.decode("latin-1").split(",")] if self._networks else []
        source: AddressSource = "peer"
        while hops and self._trusts(client):
            hop = _parse(hops.pop().strip(" \t"))
            if hop is None:
                break
            client, source = hop, "forwarded"
        return str(client), source

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def client_address(scope: Scope, trusted: TrustedProxies) -> tuple[str | None, AddressSource]:
    """Address of the client of a request, and where it is from; None where there is no network, as in tests."""
    client = scope.get("client")
    if not client:
        return None, "peer"
    return trusted.client(client[0], (value for name, value in scope["headers"] if name == b"x-forwarded-for"))


def _parse(text: str) -> Address | None:
    """The address that a proxy wrote down, with or without a port."""
    if (match := _WITH_PORT.fullmatch(text)) is not None:
        text = match[1] or match[2]
    return parse_address(text)
