"""Which addresses are one client's."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.client_network import client_network, parse_address


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::1", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        (None, ""),
        ("", ""),
        ("testclient", ""),
        ("192.0.2.7:80", ""),
    ],
)
def test_what_counts_as_one_client(address: str | None, network: str) -> None:
    assert client_network(address) == network


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_a_client_can_choose_the_last_64_bits(address: ipaddress.IPv6Address, low: int) -> None:
    other = ipaddress.IPv6Address(int(address) >> 64 << 64 | low)
    if address.ipv4_mapped is None and other.ipv4_mapped is None:
        assert client_network(str(address)) == client_network(str(other))
    assert client_network(str(address)) != client_network(str(ipaddress.IPv6Address(int(address) ^ 1 << 64)))


@given(st.ip_addresses(v=4))
def test_an_address_is_the_same_however_it_is_written(address: ipaddress.IPv4Address) -> None:
    assert parse_address(f"::ffff:{address}") == parse_address(str(address)) == address


@given(st.text())
def test_any_text_is_an_address_or_none(text: str) -> None:
    parsed = parse_address(text)
    assert parsed is None or parse_address(str(parsed)) == parsed
