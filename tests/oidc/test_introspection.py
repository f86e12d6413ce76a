"""Opaque tokens: how the issuer is asked, how often, and what its answer means."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt

from inferflux_core.errors import ConfigError
from oidc.checked import Checked, checking
from oidc.hostile_provider import DISCOVERY, INTROSPECTION, HostileProvider, hostile_provider
from oidc.tokens import NOW, claims, ec_key, rsa_key, token


@pytest.fixture
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


def asking(issuer: HostileProvider, **changes: Any) -> dict[str, Any]:
    return {"issuer": issuer.url, "introspection": {"client_id": "rs", "client_secret": "s3cret", **changes}}


async def test_a_token_is_asked_about_once_a_minute(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True)
    async with checking(asking(issuer)) as checked:
        principal = await checked.principal("opaque")
        assert (principal.subject, principal.tenant, principal.scopes) == (f"user:{issuer.url}|alice", "t1", {"generate"})
        checked.clock.advance(59)
        assert await checked.principal("opaque") == principal
        assert issuer.fetches(INTROSPECTION) == 1
        issuer.answers.clear()  # revoked
        checked.clock.advance(2)
        assert await checked.verdict("opaque") == "token_inactive"
        assert issuer.fetches(INTROSPECTION) == 2


async def test_a_yes_is_not_remembered_beyond_the_life_of_the_token(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True, exp=NOW + 20)
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque") == "accepted"
        checked.clock.advance(19)
        assert await checked.verdict("opaque") == "accepted"
        assert issuer.fetches(INTROSPECTION) == 1
        checked.clock.advance(2)
        assert await checked.verdict("opaque") == "accepted"  # within the leeway, and asked again
        assert issuer.fetches(INTROSPECTION) == 2
        checked.clock.advance(30)
        assert await checked.verdict("opaque") == "token_expired"


async def test_a_no_is_remembered_for_ten_seconds(issuer: HostileProvider) -> None:
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque") == "token_inactive"
        issuer.answers["opaque"] = claims(issuer.url, active=True)
        checked.clock.advance(9)
        assert await checked.verdict("opaque") == "token_inactive"
        checked.clock.advance(2)
        assert await checked.verdict("opaque") == "accepted"
    assert issuer.fetches(INTROSPECTION) == 2


async def test_the_same_token_at_once_is_asked_about_once(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True)
    async with checking(asking(issuer)) as checked:
        assert set(await asyncio.gather(*(checked.verdict("opaque") for _ in range(20)))) == {"accepted"}
    assert issuer.fetches(INTROSPECTION) == 1


class Held:
    """A reply that waits to be let go.

    Attributes:
        arrived: how many requests came for it.
        four: set once four did.
    """

    def __init__(self, issuer: HostileProvider, answer: dict[str, Any]) -> None:
        self._reply = issuer.json(answer)
        self._lock = threading.Lock()
        self.arrived = 0
        self.first, self.four, self.go_on = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.arrived += 1
            self.first.set()
            if self.arrived == 4:
                self.four.set()
        self.go_on.wait(10)
        self._reply(handler)


async def test_at_most_four_calls_at_a_time(issuer: HostileProvider) -> None:
    held = Held(issuer, {"active": False})
    issuer.replies[INTROSPECTION] = held
    async with checking(asking(issuer)) as checked:
        waiting = [asyncio.create_task(checked.verdict(f"opaque{i}", f"192.0.2.{i % 3}")) for i in range(12)]
        assert await asyncio.to_thread(held.four.wait, 10)
        # Two requests to the issuer and back: a fifth call would have arrived in the meantime.
        assert await checked.verdict(token(issuer.url)) == "accepted"
        assert held.arrived == 4
        held.go_on.set()
        assert set(await asyncio.gather(*waiting)) == {"token_inactive"}
        assert held.arrived == 12


async def test_a_burst_of_invented_tokens_holds_up_nobody_else(issuer: HostileProvider) -> None:
    held = Held(issuer, {"active": False})
    answer = issuer.replies[INTROSPECTION]

    def reply(handler: BaseHTTPRequestHandler) -> None:
        (answer if issuer.requests[-1][3]["token"] == "good" else held)(handler)

    issuer.answers["good"] = claims(issuer.url, active=True)
    issuer.replies[INTROSPECTION] = reply
    async with checking(asking(issuer)) as checked:
        # One client has a /64 to choose its addresses from.
        burst = [asyncio.create_task(checked.verdict(f"junk{i}", f"2001:db8::{i:x}")) for i in range(66)]
        assert await asyncio.to_thread(held.first.wait, 10)
        assert await checked.verdict("more", "2001:db8::ffff") == "unavailable"  # 2 are asked about and 64 wait
        assert await checked.verdict("good", "2001:db8:0:1::1") == "accepted"
        assert await checked.verdict("good", "2001:db8::1") == "accepted"  # what is known needs no call
        assert held.arrived == 2
        held.go_on.set()
        assert set(await asyncio.gather(*burst)) == {"token_inactive"}
    assert "circuit_opened" not in checked.events


async def test_a_caller_that_goes_away_does_not_end_the_call_of_others(issuer: HostileProvider) -> None:
    held = Held(issuer, claims(issuer.url, active=True))
    issuer.replies[INTROSPECTION] = held
    async with checking(asking(issuer)) as checked:
        first = asyncio.create_task(checked.verdict("opaque"))
        second = asyncio.create_task(checked.verdict("opaque"))
        assert await asyncio.to_thread(held.first.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        held.go_on.set()
        assert await second == "accepted"
    assert held.arrived == 1


async def test_a_failing_issuer_is_left_alone_and_then_tried_by_one(issuer: HostileProvider) -> None:
    issuer.replies[INTROSPECTION] = issuer.body(b"", status=500)
    async with checking(asking(issuer)) as checked:
        for number in range(5):
            assert await checked.verdict(f"opaque{number}") == "unavailable"
        assert issuer.fetches(INTROSPECTION) == 5
        assert await checked.verdict("opaque") == "unavailable"
        assert issuer.fetches(INTROSPECTION) == 5
        checked.clock.advance(10)
        verdicts = await asyncio.gather(*(checked.verdict(f"again{number}") for number in range(10)))
        assert set(verdicts) == {"unavailable"}
        assert issuer.fetches(INTROSPECTION) == 6
        issuer.answers["opaque"] = claims(issuer.url, active=True)
        issuer.replies[INTROSPECTION] = issuer.json(issuer.answers["opaque"])
        checked.clock.advance(10)
        assert await checked.verdict("opaque") == "accepted"
        assert await checked.verdict("another") == "accepted"
        assert checked.events.count("circuit_opened") == 2


@pytest.mark.parametrize("status", [400, 404, 406, 413, 414, 422, 431, 451])
async def test_an_issuer_that_will_not_look_at_a_token_refuses_it(issuer: HostileProvider, status: int) -> None:
    good = issuer.replies[INTROSPECTION]
    issuer.answers["good"] = claims(issuer.url, active=True)
    issuer.replies[INTROSPECTION] = issuer.body(b'{"error":"invalid_request"}', status=status)
    async with checking(asking(issuer)) as checked:
        for number in range(7):
            assert await checked.verdict(f"junk{number}") == "token_inactive"
        issuer.replies[INTROSPECTION] = good
        assert await checked.verdict("good") == "accepted"
        assert set(checked.events) == {"introspected"}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error":"invalid_client"}'), (400, b'{"error":"unauthorized_client"}'), (401, b""), (403, b""), (408, b""),
        (429, b""), (500, b""), (302, b""), (204, b""),
    ],
)  # fmt: skip
async def test_a_refusal_of_this_server_is_none_of_the_token(issuer: HostileProvider, status: int, body: bytes) -> None:
    issuer.replies[INTROSPECTION] = issuer.body(body, status=status)
    async with checking(asking(issuer)) as checked:
        verdicts = [await checked.verdict(f"opaque{number}") for number in range(5)]
        assert set(verdicts) == {"unavailable"}
        assert checked.events == ["introspection_failed"] * 5 + ["circuit_opened"]


async def test_metadata_that_are_not_there_say_nothing_of_a_token(issuer: HostileProvider) -> None:
    del issuer.replies[DISCOVERY]
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque") == "unavailable"


async def test_a_missing_endpoint_is_logged_with_the_cure(issuer: HostileProvider, caplog: pytest.LogCaptureFixture) -> None:
    issuer.replies[INTROSPECTION] = issuer.body(b"", status=404)
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque") == "token_inactive"
    warnings = [record.__dict__["fields"]["cure"] for record in caplog.records if record.name == "inferflux.oidc"]
    assert warnings == ["check introspection.endpoint"]


async def test_the_longest_opaque_token(issuer: HostileProvider) -> None:
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("x" * 4097) == "token_length"
        assert issuer.fetches(INTROSPECTION) == 0
        assert await checked.verdict("x" * 4096) == "token_inactive"
    async with checking({**asking(issuer), "jwt": False}) as checked:
        assert await checked.verdict(f"e30.{'x' * 5000}.x") == "token_inactive"  # longer, as JSON Web Tokens are


async def test_a_failure_is_not_remembered_as_a_no(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True)
    good = issuer.replies[INTROSPECTION]
    issuer.replies[INTROSPECTION] = issuer.body(b"", status=500)
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque") == "unavailable"
        issuer.replies[INTROSPECTION] = good
        assert await checked.verdict("opaque") == "accepted"


async def test_a_client_for_itself_is_named_by_its_id(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True, sub=..., client_id="svc", iat=...)
    async with checking(asking(issuer)) as checked:
        assert (await checked.principal("opaque")).subject == f"user:{issuer.url}|svc"


async def test_the_allow_list_of_clients_holds_for_opaque_tokens(issuer: HostileProvider) -> None:
    issuer.answers["opaque"] = claims(issuer.url, active=True, client_id="stranger")
    async with checking({**asking(issuer), "clients": ["cli"]}) as checked:
        assert await checked.verdict("opaque") == "token_client"


@pytest.mark.parametrize("text", ["two words", "a\nb", "é", "a=b", '"', "\0", "x" * 16_385, "=", "\udc80"])
async def test_what_no_bearer_token_can_be_is_not_asked_about(issuer: HostileProvider, text: str) -> None:
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict(text) in ("token_malformed", "token_length")
    assert issuer.requests == []


async def test_jwts_are_asked_about_where_they_are_not_checked_here(issuer: HostileProvider) -> None:
    text = token(issuer.url)
    async with checking({**asking(issuer), "jwt": False}) as checked:
        assert await checked.verdict(text) == "token_inactive"
        await checked.provider.start()
    assert issuer.fetches() == 0
    issuer.answers[text] = claims(issuer.url, active=True)
    with hostile_provider() as other:
        async with checking({**asking(issuer), "jwt": False}, {"issuer": other.url}) as checked:
            assert await checked.verdict(text) == "accepted"
            assert await checked.verdict(token(other.url)) == "accepted"
            assert await checked.verdict(token(issuer.url, sub="bob")) == "token_inactive"
    assert other.fetches(INTROSPECTION) == 0
    assert issuer.fetches() == 0


# --- how this server proves itself ------------------------------------------------------------------------------------


async def ask_once(issuer: HostileProvider, checked: Checked) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and form of the call."""
    await checked.verdict("opaque")
    method, path, headers, form = issuer.requests[-1]
    assert (method, path) == ("POST", INTROSPECTION)
    return headers, form


async def test_client_secret_basic_encodes_both_parts_first(issuer: HostileProvider) -> None:
    async with checking(asking(issuer, client_id="a:b", client_secret="p %+ü")) as checked:
        headers, form = await ask_once(issuer, checked)
    assert form == {"token": "opaque", "token_type_hint": "access_token"}
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"a%3Ab:p+%25%2B%C3%BC"


@pytest.mark.parametrize("where", ["env", "file"])
async def test_the_secret_may_be_elsewhere(
    issuer: HostileProvider, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RS_SECRET", "s3cret")
    (tmp_path / "secret").write_text("s3cret\n")
    place = {"client_secret": None, "client_secret_env": "RS_SECRET"}
    if where == "file":
        place = {"client_secret": None, "client_secret_file": str(tmp_path / "secret")}
    async with checking(asking(issuer, **place)) as checked:
        headers, _ = await ask_once(issuer, checked)
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"rs:s3cret"


async def test_private_key_jwt_signs_a_new_assertion_each_time(issuer: HostileProvider, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(ec_key().as_pem(private=True))
    settings = {
        "client_secret": None,
        "private_key_file": str(tmp_path / "key.pem"),
        "private_key_algorithm": "ES256",
        "private_key_id": "k1",
    }
    async with checking(asking(issuer, **settings)) as checked:
        headers, form = await ask_once(issuer, checked)
        checked.clock.advance(11)
        _, again = await ask_once(issuer, checked)
    assert "Authorization" not in headers
    assert form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    read = jwt.decode(form["client_assertion"], ec_key(), algorithms=["ES256"])
    assert read.header == {"alg": "ES256", "typ": "JWT", "kid": "k1"}
    jti = read.claims.pop("jti")
    assert read.claims == {"iss": "rs", "sub": "rs", "aud": issuer.url, "iat": int(NOW), "exp": int(NOW) + 60}
    assert jwt.decode(again["client_assertion"], ec_key(), algorithms=["ES256"]).claims["jti"] != jti


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client_secret_env": "NOT_SET_HERE"}, "environment variable 'NOT_SET_HERE' is empty"),
        ({"client_secret_file": "/nonexistent/secret"}, "cannot be read"),
        ({"private_key_file": "/nonexistent/key"}, "cannot be read"),
        ({"private_key_file": "PUBLIC"}, "no unencrypted PEM private key"),
        ({"private_key_file": "EC"}, "no unencrypted PEM private key"),
        ({"private_key_file": "EC", "private_key_algorithm": "ES384"}, "cannot sign with 'ES384'"),
        ({"client_secret": ""}, "is empty"),
    ],
    ids=str,
)
def test_a_proof_that_cannot_be_made_stops_the_start(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "PUBLIC").write_bytes(rsa_key().as_pem(private=False))
    (tmp_path / "EC").write_bytes(ec_key().as_pem(private=True))
    if (name := settings.get("private_key_file", "/")).isupper():
        settings = {**settings, "private_key_file": str(tmp_path / name)}
    with pytest.raises(ConfigError, match=message):
        Checked({"issuer": "https://login.example.com", "introspection": {"client_id": "rs", **settings}})


async def test_nothing_secret_is_logged_or_shown(issuer: HostileProvider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    issuer.replies[INTROSPECTION] = issuer.body(b'{"error":"opaque-token"}', status=401)
    async with checking(asking(issuer)) as checked:
        assert await checked.verdict("opaque-token") == "unavailable"
        shown = repr(vars(checked.provider)) + repr(checked.provider._settings)
    warnings = [record for record in caplog.records if record.name == "inferflux.oidc"]
    assert [record.__dict__["fields"]["cure"] for record in warnings] == ["check introspection.client_id and its secret or key"]
    text = shown + "".join(f"{record.getMessage()} {record.__dict__.get('fields')}" for record in caplog.records)
    for secret in ("s3cret", "opaque-token", base64.b64encode(b"rs:s3cret").decode()):
        assert secret not in text
