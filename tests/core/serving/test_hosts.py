"""Which names a server answers to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.errors import ConfigError
from inferflux_core.serving.hosts import HostCheck


def status(check: HostCheck, *hosts: str, version: str = "1.1", address: str | None = None) -> int:
    problem = check.problem([host.encode("latin-1") for host in hosts], http_version=version, address=address)
    return 200 if problem is None else problem[0]


LISTED = HostCheck("0.0.0.0", ("llm.example.com", "*.ai.example.com"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("llm.example.com", 200),
        ("LLM.Example.COM:8443", 200),
        ("llm.example.com.", 200),
        ("a.ai.example.com", 200),
        ("a.b.ai.example.com", 200),
        ("ai.example.com", 421),
        (".ai.example.com", 421),
        ("xai.example.com", 421),
        ("a.ai.example.com.evil.example", 421),
        ("example.com", 421),
        ("llm.example.com.evil.example", 421),
        ("10.1.2.3", 200),  # the address it was reached at
        ("10.1.2.4", 421),
        ("localhost", 421),
        ("127.0.0.1", 421),
        ("*.ai.example.com", 400),
        ("llm.example.com@evil.example", 400),
        ("llm.example.com:80:90", 400),
        ("llm.example.com:port", 400),
        ("llm.example.com/", 400),
        ("llm.example.com evil.example", 400),
        ("llm.example.com, evil.example", 400),
        ("llm.example.com\t", 400),
        ("\xe9.example.com", 400),
        ("", 400),
    ],
)
def test_listed_names(host: str, expected: int) -> None:
    assert status(LISTED, host, address="10.1.2.3") == expected


def test_own_addresses() -> None:
    assert status(LISTED, "localhost", address="127.0.0.1") == 200  # a probe on the same machine
    assert status(LISTED, "[2001:db8::1]:80", address="2001:db8::1") == 200
    assert status(HostCheck("127.0.0.1", ("llm.example.com",)), "llm.example.com") == 200
    assert status(HostCheck("127.0.0.1", ("llm.example.com",)), "localhost") == 200
    assert status(HostCheck("127.0.0.1", ("llm.example.com",)), "evil.example") == 421
    assert status(HostCheck("127.0.0.1"), "10.0.0.1", address="127.0.0.1") == 421


def test_exactly_one() -> None:
    anywhere = HostCheck("0.0.0.0")
    assert status(anywhere, "any.example") == 200
    assert status(anywhere) == 400
    assert status(anywhere, version="1.0") == 200
    assert status(anywhere, "any.example", "any.example") == 400
    for strict in (LISTED, HostCheck("localhost")):
        assert status(strict, version="1.0") == 400


def test_the_message_names_the_cure() -> None:
    problem = LISTED.problem([b"evil.example"])
    assert problem == (
        421,
        "This server does not answer to the name 'evil.example'; use a name that is in server.allowed_hosts, or add this one "
        "there.",
    )


@pytest.mark.parametrize(
    "pattern", ["https://llm.example.com", "llm.example.com:8080", "*", "*.", "a.*.com", "a b", "", "*example.com", "a/b"]
)
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.allowed_hosts: .* is not a host name"):
        HostCheck("0.0.0.0", (pattern,))


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_nothing_but_the_listed_names_passes(host: str) -> None:
    if status(LISTED, host) == 200:
        name = host.rpartition(":")[0] or host
        name = name.lower().removesuffix(".")
        assert name == "llm.example.com" or name.endswith(".ai.example.com")
