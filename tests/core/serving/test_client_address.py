"""Whose request it is, behind trusted proxies and without any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Scope

from inferflux_core.errors import ConfigError
from inferflux_core.serving.client_address import TrustedProxies, client_address

PROXY, INNER = "10.0.0.1", "10.0.0.2"
TRUSTED = TrustedProxies(("10.0.0.0/24", "2001:db8::/64"))


def scope(peer: str | None, *forwarded_for: str) -> Scope:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded_for]
    return {"type": "http", "client": (peer, 1234) if peer else None, "headers": [(b"host", b"x"), *headers]}


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address", "source"),
    [
        (PROXY, ("192.0.2.1",), "192.0.2.1", "forwarded"),
        (PROXY, ("192.0.2.9, 192.0.2.1",), "192.0.2.1", "forwarded"),  # the left one the client wrote itself
        (PROXY, ("192.0.2.9", "192.0.2.1"), "192.0.2.1", "forwarded"),
        (PROXY, (f"192.0.2.9,192.0.2.1 ,\t{INNER}",), "192.0.2.1", "forwarded"),
        (PROXY, (INNER,), INNER, "forwarded"),  # a request of the proxy's own network
        (PROXY, (), PROXY, "peer"),
        (PROXY, ("",), PROXY, "peer"),
        (PROXY, ("192.0.2.1, unknown",), PROXY, "peer"),
        (PROXY, (f"192.0.2.1, junk, {INNER}",), INNER, "forwarded"),
        (PROXY, ("192.0.2.1:4711",), "192.0.2.1", "forwarded"),
        (PROXY, ("[2001:db8:1::1]:4711",), "2001:db8:1::1", "forwarded"),
        (PROXY, ("2001:DB8:1::1",), "2001:db8:1::1", "forwarded"),
        (PROXY, ("::ffff:192.0.2.1",), "192.0.2.1", "forwarded"),
        ("::ffff:10.0.0.1", ("192.0.2.1",), "192.0.2.1", "forwarded"),
        ("2001:db8::5", ("192.0.2.1",), "192.0.2.1", "forwarded"),
        ("192.0.2.7", ("192.0.2.1",), "192.0.2.7", "peer"),  # not a proxy: what it says does not count
        ("192.0.2.7", ("10.0.0.1",), "192.0.2.7", "peer"),
        ("127.0.0.1", ("192.0.2.1",), "127.0.0.1", "peer"),
        (PROXY, ("010.0.0.3",), PROXY, "peer"),  # no octal
        (PROXY, ("1",), PROXY, "peer"),  # no integer
        (PROXY, ("\xb9\xb2.0.0.1",), PROXY, "peer"),  # no digits of other kinds
        (None, ("192.0.2.1",), None, "peer"),
    ],
)
def test_client_address(peer: str | None, forwarded_for: tuple[str, ...], address: str | None, source: str) -> None:
    assert client_address(scope(peer, *forwarded_for), TRUSTED) == (address, source)


@given(st.lists(st.text(st.characters(codec="latin-1", exclude_characters=",\r\n"), max_size=20), max_size=5))
def test_a_client_cannot_choose_its_address(written: list[str]) -> None:
    """Whatever it sends: the trusted proxy appends where it came from, and that is what counts."""
    forwarded_for = ",".join([*written, "192.0.2.1"])
    assert client_address(scope(PROXY, forwarded_for), TRUSTED) == ("192.0.2.1", "forwarded")
    assert client_address(scope("192.0.2.1", *written), TRUSTED) == ("192.0.2.1", "peer")


def test_no_proxies_trusted() -> None:
    assert client_address(scope(PROXY, "192.0.2.1"), TrustedProxies()) == (PROXY, "peer")


def test_membership() -> None:
    assert "10.0.0.77" in TRUSTED
    assert "::ffff:10.0.0.77" in TRUSTED
    assert "10.0.1.1" not in TRUSTED
    assert "proxy.example.com" not in TRUSTED


@pytest.mark.parametrize("text", ["proxy.example.com", "10.0.0.1/24", "10.0.0.0/33", "", "*"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.trusted_proxies: .* write one such as '10\.0\.0\.7'"):
        TrustedProxies((text,))
