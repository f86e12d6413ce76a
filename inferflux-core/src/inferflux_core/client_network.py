"""What an address of a client says about who it is: IPv4 within IPv6 is IPv4, and an IPv6 subscriber has a whole /64."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """An address, the same object however it was written: `::ffff:192.0.2.1` is `192.0.2.1`, as on a socket that speaks both,
    and a zone (`%eth0`) does not count. None if it is no address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def client_network(address: str | None) -> str:
    """What counts as one client: an IPv4 address, or the /64 that an IPv6 client can choose its addresses from.

    Clients without an address, as on a Unix socket, count as one; for them it is empty.
    """
    parsed = parse_address(address or "")
    if parsed is None:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
