"""Attacks on token authentication: items 31 to 38 of the security reference."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest

from inferflux_core.errors import AuthenticationError
from oidc.checked import checking
from oidc.hostile_provider import DISCOVERY, INTROSPECTION, JWKS, HostileProvider, Reply, hostile_provider
from oidc.token_matrix import REFUSED, Case
from oidc.tokens import NOW, RESOURCE, claims, header, key_set, rsa_key, sign, token


@pytest.fixture(scope="module")
def steady() -> Iterator[HostileProvider]:
    """A provider whose replies no test changes."""
    with hostile_provider() as provider:
        yield provider


@pytest.fixture
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


def with_introspection(issuer: HostileProvider) -> dict[str, object]:
    return {"issuer": issuer.url, "introspection": {"client_id": "rs", "client_secret": "s3cret"}}


# --- 31: the token matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_31_a_bad_token_is_refused_for_what_is_bad_about_it(steady: HostileProvider, case: Case) -> None:
    bad = case.make(steady.url)
    async with checking({"issuer": steady.url, **case.issuer}) as checked:
        assert await checked.verdict(bad) == case.reason


async def test_31_all_refusals_read_the_same_to_the_client(steady: HostileProvider) -> None:
    replies = set()
    async with checking({"issuer": steady.url}) as checked:
        for case in (case for case in REFUSED if not case.issuer):
            with pytest.raises(AuthenticationError) as caught:
                await checked.principal(case.make(steady.url))
            replies.add((str(caught.value), str(caught.value.body()), str(caught.value.headers)))
    assert len(replies) == 1


# --- 32: the wrong token ----------------------------------------------------------------------------------------------


async def test_32_an_id_token_is_no_access_token(steady: HostileProvider) -> None:
    id_token = sign(header(typ="JWT"), claims(steady.url, aud="cli", nonce="n", azp="cli"))
    async with checking({"issuer": steady.url}) as checked:
        assert await checked.verdict(id_token) == "token_audience"
    async with checking({"issuer": steady.url, "audiences": ["cli"], "required_typ": []}) as checked:
        assert await checked.verdict(id_token) == "token_type"


async def test_32_a_token_for_another_audience(steady: HostileProvider) -> None:
    async with checking({"issuer": steady.url, "audiences": ["mine"]}) as checked:
        assert await checked.verdict(token(steady.url)) == "token_audience"
        assert await checked.verdict(token(steady.url, aud="mine")) == "accepted"


async def test_32_the_same_sub_at_another_issuer_is_somebody_else(steady: HostileProvider, issuer: HostileProvider) -> None:
    async with checking({"issuer": steady.url}, {"issuer": issuer.url}) as checked:
        one = await checked.principal(token(steady.url))
        other = await checked.principal(token(issuer.url))
    assert (one.subject, other.subject) == (f"user:{steady.url}|alice", f"user:{issuer.url}|alice")


async def test_32_an_issuer_cannot_sign_for_another(steady: HostileProvider, issuer: HostileProvider) -> None:
    issuer.publish(rsa_key("own"))
    stolen = sign(header(kid="own"), claims(steady.url), rsa_key("own"))
    async with checking({"issuer": steady.url}, {"issuer": issuer.url}) as checked:
        assert await checked.verdict(stolen) == "token_key"


# --- 33: a flood of unknown key ids -----------------------------------------------------------------------------------


async def test_33_a_flood_of_unknown_keys_fetches_once_in_thirty_seconds(issuer: HostileProvider) -> None:
    flood = [sign(header(kid=f"k{i}"), claims(issuer.url)) for i in range(5)]
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(flood[0]) == "token_key"
        assert issuer.fetches() == 1  # the first fetch answered it already
        for second in range(30):
            assert issuer.fetches() == 1, f"after {second} s"
            verdicts = await asyncio.gather(*(checked.verdict(flood[i % 5]) for i in range(200)))
            assert set(verdicts) == {"token_key"}
            checked.clock.advance(1)
        verdicts = await asyncio.gather(*(checked.verdict(flood[i % 5]) for i in range(1000)))
        assert set(verdicts) == {"token_key"}
        assert issuer.fetches() == 2
        assert await checked.verdict(token(issuer.url)) == "accepted"


# --- 34: rotation -----------------------------------------------------------------------------------------------------


async def test_34_a_new_key_is_found_with_one_fetch_and_a_removed_one_goes_with_the_ttl(issuer: HostileProvider) -> None:
    old, new = token(issuer.url, exp=NOW + 9000), sign(header(kid="new"), claims(issuer.url, exp=NOW + 9000), rsa_key("new"))
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(old) == "accepted"
        issuer.publish(rsa_key(), rsa_key("new"))
        # All that arrive at once wait for the one fetch.
        assert await asyncio.gather(*(checked.verdict(new) for _ in range(20))) == ["accepted"] * 20
        assert issuer.fetches() == 2
        issuer.publish(rsa_key("new"))
        checked.clock.advance(239)
        assert await checked.verdict(old) == "accepted"
        assert issuer.fetches() == 2
        checked.clock.advance(62)  # 301 s after the last fetch
        assert await checked.verdict(old) == "token_key"
        assert await checked.verdict(new) == "accepted"
        assert issuer.fetches() == 3


# --- 35: a provider that misbehaves -----------------------------------------------------------------------------------

METADATA_SERVICE = {"Location": "http://169.254.169.254/latest/meta-data/"}
OCT_KEY = {"keys": [{"kty": "oct", "kid": "rsa", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"}]}
MISBEHAVIOURS: dict[str, Callable[[HostileProvider], Reply]] = {
    "500": lambda p: p.body(b"{}", status=500),
    "timeout": lambda p: p.silence,
    "slow drip": lambda p: p.drip,
    "100 MiB": lambda p: p.flood,
    "redirect": lambda p: p.body(b"", status=302, headers=METADATA_SERVICE),
    "HTML": lambda p: p.body(b"<html>Sign in</html>", headers={"Content-Type": "text/html"}),
    "empty": lambda p: p.body(b""),
    "empty set": lambda p: p.json({"keys": []}),
    "no set": lambda p: p.json({}),
    "keys is an object": lambda p: p.json({"keys": {}}),
    "array": lambda p: p.json([]),
    "deep": lambda p: p.body(b'{"keys":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "redirect to good keys": lambda p: p.body(b"", status=307, headers={"Location": "/elsewhere"}),
    "said to be compressed": lambda p: p.body(json.dumps(key_set(rsa_key())).encode(), headers={"Content-Encoding": "gzip"}),
    "oct key": lambda p: p.json(OCT_KEY),
    "private key": lambda p: p.json({"keys": [dict(rsa_key().as_dict(private=True))]}),
}


def patience(misbehaviour: str) -> float:
    """Seconds until the provider is given up; few where that is what the test waits for."""
    return 0.5 if misbehaviour in ("timeout", "slow drip") else 5.0


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS)
async def test_35_without_keys_nobody_can_be_checked(issuer: HostileProvider, misbehaviour: str) -> None:
    issuer.replies[JWKS] = MISBEHAVIOURS[misbehaviour](issuer)
    issuer.replies["/elsewhere"] = issuer.json(key_set(rsa_key()))
    async with checking({"issuer": issuer.url}, timeout_s=patience(misbehaviour)) as checked:
        assert await checked.verdict(token(issuer.url)) == "unavailable"
        fetches = issuer.fetches()
        assert await checked.verdict(token(issuer.url)) == "unavailable"
        assert issuer.fetches() == fetches  # not at every request
        assert issuer.fetches("/elsewhere") == 0
        assert issuer.sent < 16 * 1024 * 1024  # of the 100 MiB, what buffers took
        issuer.publish(rsa_key())
        checked.clock.advance(1)
        assert await checked.verdict(token(issuer.url)) == "accepted"


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS)
async def test_35_the_last_good_keys_serve_for_an_hour(issuer: HostileProvider, misbehaviour: str) -> None:
    good = token(issuer.url, exp=NOW + 9000)
    async with checking({"issuer": issuer.url}, timeout_s=patience(misbehaviour)) as checked:
        assert await checked.verdict(good) == "accepted"
        issuer.replies[JWKS] = MISBEHAVIOURS[misbehaviour](issuer)
        checked.clock.advance(301)
        assert await checked.verdict(good) == "accepted"
        assert checked.events.count("keys_failed") == 1
        checked.clock.advance(3598)
        assert await checked.verdict(good) == "accepted"
        checked.clock.advance(2)
        assert await checked.verdict(good) == "unavailable"


@pytest.mark.parametrize("misbehaviour", ["500", "redirect", "HTML", "empty", "oct key"])
async def test_35_metadata_that_are_none(issuer: HostileProvider, misbehaviour: str) -> None:
    issuer.replies[DISCOVERY] = MISBEHAVIOURS[misbehaviour](issuer)
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(token(issuer.url)) == "unavailable"
        assert issuer.fetches() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"jwks_uri": "http://169.254.169.254/latest"},
        {"jwks_uri": "https://evil.example/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": 1},
    ],
    ids=str,
)
async def test_35_metadata_that_lead_elsewhere(issuer: HostileProvider, changes: dict[str, object]) -> None:
    issuer.replies[DISCOVERY] = issuer.json(issuer.metadata(**changes))
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(token(issuer.url)) == "unavailable"
        assert issuer.fetches() == 0


# --- 36: clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"exp": NOW - 29}, "accepted"),
        ({"exp": NOW - 31}, "token_expired"),
        ({"nbf": NOW + 29}, "accepted"),
        ({"nbf": NOW + 31}, "token_early"),
        ({"iat": NOW + 29}, "accepted"),
        ({"iat": NOW + 31}, "token_early"),
    ],
    ids=str,
)
async def test_36_clocks_may_differ_by_half_a_minute(steady: HostileProvider, changes: dict[str, float], verdict: str) -> None:
    async with checking({"issuer": steady.url}) as checked:
        assert await checked.verdict(token(steady.url, **changes)) == verdict


# --- 37: introspection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"active": True}, "accepted"),
        ({"active": "true"}, "token_inactive"),
        ({"active": 1}, "token_inactive"),
        ({"active": False}, "token_inactive"),
        ({}, "token_inactive"),
        ({"active": True, "aud": "https://other.example.com"}, "token_audience"),
        ({"active": True, "aud": ...}, "token_claims"),
        ({"active": True, "iss": "https://evil.example"}, "token_issuer"),
        ({"active": True, "exp": NOW - 31}, "token_expired"),
        ({"active": True, "exp": ...}, "token_claims"),
        ({"active": True, "token_type": "refresh_token"}, "token_type"),
    ],
    ids=str,
)
async def test_37_only_a_plain_yes_is_a_yes(issuer: HostileProvider, changes: dict[str, object], verdict: str) -> None:
    issuer.answers["opaque-token"] = claims(issuer.url, **changes)
    async with checking(with_introspection(issuer)) as checked:
        assert await checked.verdict("opaque-token") == verdict


@pytest.mark.parametrize("misbehaviour", ["500", "timeout", "slow drip", "100 MiB", "redirect", "HTML", "array"])
async def test_37_an_issuer_that_cannot_be_asked(issuer: HostileProvider, misbehaviour: str) -> None:
    issuer.replies[INTROSPECTION] = MISBEHAVIOURS[misbehaviour](issuer)
    async with checking(with_introspection(issuer), timeout_s=patience(misbehaviour)) as checked:
        assert await checked.verdict("opaque-token") == "unavailable"


# --- 38: tokens that begin alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 200])
async def test_38_tokens_that_begin_alike_are_independent(issuer: HostileProvider, length: int) -> None:
    names = [f"user{i}" for i in range(5)]
    for name in names:
        issuer.answers["x" * length + name] = claims(issuer.url, active=True, sub=name)
    async with checking(with_introspection(issuer)) as checked:
        for _ in range(2):  # asked, then remembered
            for name in names:
                assert (await checked.principal("x" * length + name)).subject == f"user:{issuer.url}|{name}"
        assert await checked.verdict("x" * length) == "token_inactive"
        assert issuer.fetches(INTROSPECTION) == len(names) + 1


async def test_38_jwts_that_begin_alike_are_independent(steady: HostileProvider) -> None:
    one, other = (token(steady.url, sub=name, aud=[RESOURCE, "x" * 400]) for name in ("alice", "admin"))
    assert one[:200] == other[:200]
    async with checking({"issuer": steady.url}) as checked:
        for expected, text in (("alice", one), ("admin", other), ("alice", one)):
            assert (await checked.principal(text)).subject == f"user:{steady.url}|{expected}"
