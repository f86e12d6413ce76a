"""Keys of an issuer: when they are fetched, how long they serve, what they must be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.errors import SecurityWarning
from joserfc.jwk import RSAKey

from inferflux_auth_oidc.signing_keys import read_key_set
from oidc.checked import Checked, checking
from oidc.hostile_provider import DISCOVERY, JWKS, HostileProvider, hostile_provider
from oidc.tokens import NOW, claims, ec_key, ed_key, header, key_set, rsa_key, sign, token


@pytest.fixture
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


def long_lived(issuer: HostileProvider) -> str:
    return token(issuer.url, exp=NOW + 100_000)


async def background(checked: Checked) -> None:
    """Wait for the fetch that a token has begun."""
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "inferflux-oidc-keys"]
    assert len(tasks) == 1
    await asyncio.gather(*tasks)


async def test_tokens_that_come_together_wait_for_one_fetch(issuer: HostileProvider) -> None:
    good = token(issuer.url)
    async with checking({"issuer": issuer.url}) as checked:
        assert set(await asyncio.gather(*(checked.verdict(good) for _ in range(20)))) == {"accepted"}
    assert [(method, path) for method, path, _, _ in issuer.requests] == [("GET", DISCOVERY), ("GET", JWKS)]


async def test_a_caller_that_goes_away_does_not_end_the_fetch_of_others(issuer: HostileProvider) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def held(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(10)
        issuer.json(key_set(rsa_key()))(handler)

    issuer.replies[JWKS] = held
    good = token(issuer.url)
    async with checking({"issuer": issuer.url}) as checked:
        first = asyncio.create_task(checked.verdict(good))
        second = asyncio.create_task(checked.verdict(good))
        assert await asyncio.to_thread(asked.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go_on.set()
        assert await second == "accepted"
    assert issuer.fetches() == 1


@pytest.mark.parametrize(
    ("cache_control", "ttl"),
    [
        (None, 300),
        ("public, max-age=600", 600),
        ('max-age="120"', 120),
        ("max-age=1", 60),
        ("s-maxage=5, max-age=99999999", 3600),
        ("no-store", 60),
        ("max-age=600, no-cache", 60),
        ("max-age=-1", 300),
        ("nonsense", 300),
    ],
)
async def test_keys_are_renewed_in_the_background_before_their_time_is_over(
    issuer: HostileProvider, cache_control: str | None, ttl: float
) -> None:
    issuer.publish(rsa_key(), cache_control=cache_control)
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(long_lived(issuer)) == "accepted"
        checked.clock.advance(0.8 * ttl - 1)
        assert await checked.verdict(long_lived(issuer)) == "accepted"
        assert issuer.fetches() == 1
        checked.clock.advance(2)
        assert await checked.verdict(long_lived(issuer)) == "accepted"
        await background(checked)
        assert issuer.fetches() == 2
        checked.clock.advance(0.8 * ttl - 1)
        assert await checked.verdict(long_lived(issuer)) == "accepted"
        assert issuer.fetches() == 2


async def test_a_failing_issuer_is_tried_less_and_less_often(issuer: HostileProvider) -> None:
    issuer.replies[JWKS] = issuer.body(b"", status=503)
    good = long_lived(issuer)
    async with checking({"issuer": issuer.url}) as checked:
        for number, pause in enumerate([1, 2, 4, 8, 16, 30, 30]):
            assert await checked.verdict(good) == "unavailable"
            assert issuer.fetches() == number + 1
            checked.clock.advance(pause - 0.5)
            assert await checked.verdict(good) == "unavailable"
            assert issuer.fetches() == number + 1
            checked.clock.advance(0.5)
        assert checked.events == ["keys_failed"] * 7


async def test_during_an_outage_nobody_waits_while_there_are_last_good_keys(issuer: HostileProvider) -> None:
    good = long_lived(issuer)
    async with checking({"issuer": issuer.url}, timeout_s=0.5) as checked:
        assert await checked.verdict(good) == "accepted"
        issuer.replies[JWKS] = issuer.silence
        checked.clock.advance(301)
        assert await checked.verdict(good) == "accepted"  # this one waited and found out
        checked.clock.advance(2)
        assert await checked.verdict(good) == "accepted"
        await background(checked)  # the next try, which that one did not wait for
        assert checked.events.count("keys_failed") == 2


async def test_an_unknown_key_during_an_outage_cannot_be_refused(issuer: HostileProvider) -> None:
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(token(issuer.url)) == "accepted"
        issuer.replies[JWKS] = issuer.body(b"", status=500)
        rotated = sign(header(kid="new"), claims(issuer.url), rsa_key("new"))
        assert await checked.verdict(rotated) == "unavailable"
        assert await checked.verdict(token(issuer.url)) == "accepted"


async def test_the_start_fetches_and_does_not_mind_an_issuer_that_is_down(
    issuer: HostileProvider, caplog: pytest.LogCaptureFixture
) -> None:
    down = "http://127.0.0.1:9"  # the discard port: nobody listens
    async with checking({"issuer": issuer.url}, {"issuer": down}) as checked:
        await checked.provider.start()
        assert sorted(checked.events) == ["keys_failed", "keys_fetched"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert await checked.verdict(token(issuer.url)) == "accepted"
        assert issuer.fetches() == 1
        assert await checked.verdict(token(down)) == "unavailable"


async def test_closing_ends_a_fetch_that_is_under_way(issuer: HostileProvider) -> None:
    asked = threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        issuer.silence(handler)

    issuer.replies[JWKS] = silent
    async with checking({"issuer": issuer.url}, timeout_s=30) as checked:
        waiting = asyncio.create_task(checked.verdict(token(issuer.url)))
        assert await asyncio.to_thread(asked.wait, 10)
        await checked.provider.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting


# --- what a key must be -----------------------------------------------------------------------------------------------


def test_keys_that_signatures_can_be_checked_with_are_kept() -> None:
    keys = read_key_set(key_set(rsa_key(), ec_key(), ed_key()))
    assert {kid: [key.key_type for key in found] for kid, found in keys.items()} == {
        "rsa": ["RSA"],
        "ec": ["EC"],
        "ed": ["OKP"],
    }


def public(**changes: Any) -> dict[str, Any]:
    entry = {**rsa_key().as_dict(private=False), **changes}
    return {name: value for name, value in entry.items() if value is not ...}


USELESS: dict[str, object] = {
    "symmetric": {"kty": "oct", "kid": "x", "k": "c2VjcmV0"},
    "public with a symmetric part": public(k="c2VjcmV0"),
    "private RSA": dict(rsa_key("x").as_dict(private=True)),
    "private EC": dict(ec_key("x").as_dict(private=True)),
    "for encryption": public(use="enc"),
    "use list": public(use=["sig"]),
    "use unknown": public(use="other"),
    "kid missing": public(kid=...),
    "kid empty": public(kid=""),
    "kid integer": public(kid=7),
    "kty unknown": public(kty="AKP"),
    "kty missing": public(kty=...),
    "kty list": public(kty=["RSA"]),
    "modulus tiny": public(n="AQAB"),
    "modulus missing": public(n=...),
    "modulus integer": public(n=1),
    "modulus not base64": public(n="!"),
    "modulus long and small": public(n="A" * 342 + "_w"),
    "modulus huge": public(n="_" * 1400),
    "exponent huge": public(e="AQAAAQ"),
    "exponent integer": public(e=3),
    "key_ops string": public(key_ops="verify", use="sig"),
    "curve unknown": {**ec_key("x").as_dict(private=False), "crv": "P-999"},
    "not on the curve": {**ec_key("x").as_dict(private=False), "x": "AAAA"},
    "Ed25519 too short": {**ed_key("x").as_dict(private=False), "x": "AAAA"},
    "string": "a string",
    "null": None,
}


@pytest.mark.parametrize("entry", USELESS.values(), ids=USELESS)
def test_a_key_that_is_no_use_is_left_out(entry: object) -> None:
    with pytest.raises(ValueError, match="no usable key"):
        read_key_set({"keys": [entry]})
    assert list(read_key_set({"keys": [entry, *key_set(ec_key("good"))["keys"]]})) == ["good"]


def test_a_weak_key_is_left_out_without_a_warning() -> None:
    with pytest.warns(SecurityWarning):
        weak = RSAKey.generate_key(1024, parameters={"kid": "weak"})
    assert list(read_key_set(key_set(weak, rsa_key()))) == ["rsa"]


def test_a_set_of_too_many_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 100"):
        read_key_set({"keys": [public()] * 101})


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5)


@given(
    st.dictionaries(
        st.sampled_from(["kty", "kid", "use", "alg", "key_ops", "n", "e", "crv", "x", "y", "x5c", "x5u"]),
        JSON | st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "sig", "AQAB", "kid"]),
    )
)
def test_no_entry_makes_the_reader_fail(entry: dict[str, Any]) -> None:
    good = key_set(ec_key("good"))["keys"]
    assert "good" in read_key_set({"keys": [entry, *good]})
