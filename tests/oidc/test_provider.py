"""The provider as the server sees it: settings, metadata, challenge, which credentials are its own."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inferflux_auth_oidc import plugin
from inferflux_auth_oidc.compact_token import take_apart
from inferflux_auth_oidc.refusal import Refusal
from inferflux_auth_oidc.settings import OidcSettings
from inferflux_auth_oidc.strict_json import parse_object
from inferflux_core.errors import AuthenticationError, ConfigError
from inferflux_core.identity import AuthContext, AuthProvider
from oidc.checked import Checked, checking
from oidc.tokens import b64, token

ISSUER = {"issuer": "https://login.example.com"}


async def test_the_plugin_makes_the_provider(tmp_path: Path) -> None:
    (registration,) = plugin.inferflux_auth_providers()
    assert (registration.name, registration.settings) == ("oidc", OidcSettings)
    settings = OidcSettings.model_validate({"issuers": [{**ISSUER, "audiences": ["a"]}]})
    provider = registration.factory(settings, AuthContext(state_dir=tmp_path, resource=None, count=lambda event: None))
    assert isinstance(provider, AuthProvider)
    await provider.close()


def test_registering_imports_nothing_heavy() -> None:
    script = (
        "import sys, inferflux_auth_oidc.plugin; print([m for m in ('joserfc', 'cryptography', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


async def test_everything_but_api_keys_is_its_own() -> None:
    async with checking(ISSUER) as checked:
        assert [checked.provider.claims(text) for text in ("ifx_live_x", "a.b.c", "opaque", "")] == [False, True, True, True]


async def test_what_is_decided_without_asking_anybody() -> None:
    asked = {"introspection": {"client_id": "rs", "client_secret": "s"}}
    other = "https://other.example.com"
    jwts = [token(ISSUER["issuer"]), token(other), token("https://stranger.example.com"), "e30.e30.x"]
    async with checking({**ISSUER, **asked}) as checked:
        assert [checked.provider.is_local(text) for text in jwts] == [True] * 4
        assert not any(checked.provider.is_local(text) for text in ("opaque", "a.b", "a.b.c.d.e", "", "ifx_live_x"))
    async with checking(ISSUER, {"issuer": other, "jwt": False, **asked}) as checked:
        assert [checked.provider.is_local(text) for text in jwts] == [True, False, True, True]
    async with checking({**ISSUER, "jwt": False, **asked}) as checked:
        assert not any(checked.provider.is_local(text) for text in jwts)


async def test_metadata_name_the_issuers_and_the_scopes() -> None:
    async with checking(ISSUER, {"issuer": "https://other.example.com", "scope_prefix": "llm:"}) as checked:
        assert checked.provider.metadata() == {
            "authorization_servers": ["https://login.example.com", "https://other.example.com"],
            "scopes_supported": [
                f"{prefix}:{a}" for prefix in ("infer", "llm") for a in ("admin", "embed", "generate", "read")
            ],
        }


async def test_a_refusal_says_nothing_to_the_client_and_leaves_the_challenge_to_the_server() -> None:
    async with checking({**ISSUER, "audiences": ["a"]}, resource="https://llm.example.com") as checked:
        with pytest.raises(AuthenticationError) as caught:
            await checked.principal("no.such.token")
    assert caught.value.reason == "token_malformed"
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert "token" not in str(caught.value.body()).replace("access token", "")


def test_an_issuer_without_audience_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"set its `audiences`, or `server\.public_url`"):
        Checked(ISSUER, resource=None)


def test_a_file_of_authorities_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not PEM")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigError, match="ca_file"):
            Checked(ISSUER, ca_file=str(tmp_path / name))


def test_a_proxy_that_is_none_stops_the_start_and_its_password_is_never_shown() -> None:
    with pytest.raises(ConfigError, match=r"oidc\.proxy cannot be used; write it as") as caught:
        Checked(ISSUER, proxy="nonsense://user:pa55word@host")
    assert "pa55word" not in str(caught.value)
    checked = Checked(ISSUER, proxy="http://user:pa55word@127.0.0.1:9")
    assert "pa55word" not in repr(vars(checked.provider)) + repr(checked.provider._settings)


SECRET = {"client_id": "rs", "client_secret": "s"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"issuer": "http://login.example.com"}, "https"),
        ({"issuer": "login.example.com"}, "not an https URL"),
        ({"issuer": "https://"}, "not an https URL"),
        ({"issuer": "https://a@login.example.com"}, "a user"),
        ({"issuer": "https://login.example.com?x"}, "a query"),
        ({"issuer": "https://login.example.com#x"}, "a fragment"),
        ({"issuer": "https://login.example.com/a|b"}, "characters"),
        ({"issuer": "https://login.example.com/\n"}, "characters"),
        ({"issuer": "https://login.example.com:99999"}, "not a URL"),
        ({"issuer": "file:///etc/passwd"}, "not an https URL"),
        ({"jwks_uri": "http://169.254.169.254/"}, "https"),
        ({"introspection": {**SECRET, "endpoint": "http://10.0.0.1/"}}, "https"),
        ({"introspection": {"client_id": "rs"}}, "exactly one"),
        ({"introspection": {**SECRET, "client_secret_env": "S"}}, "exactly one"),
        ({"algorithms": ["none"]}, "Input should be"),
        ({"algorithms": ["HS256"]}, "Input should be"),
        ({"algorithms": []}, "at least 1"),
        ({"leeway_s": 121}, "less than or equal to 120"),
        ({"jwt": False}, "no token could be checked"),
        ({"default_tenant": "a b"}, "letters, digits"),
        ({"allowed_tenants": ["a"]}, "not in allowed_tenants"),
        ({"unknown": 1}, "Extra inputs"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OidcSettings.model_validate({"issuers": [{**ISSUER, **changes}]})


def test_issuers_must_differ_and_only_one_is_asked_about_opaque_tokens() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        OidcSettings.model_validate({"issuers": [ISSUER, ISSUER]})
    other = {"issuer": "https://other.example.com", "introspection": SECRET}
    with pytest.raises(ValidationError, match="keep it for one of them"):
        OidcSettings.model_validate({"issuers": [{**ISSUER, "introspection": SECRET}, other]})
    with pytest.raises(ValidationError, match="at least 1"):
        OidcSettings.model_validate({"issuers": []})


def test_loopback_may_be_http() -> None:
    for host in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
        OidcSettings.model_validate({"issuers": [{"issuer": f"http://{host}/realm"}]})


# --- parsers ----------------------------------------------------------------------------------------------------------

NAMES = st.text(max_size=3)


@given(st.dictionaries(NAMES, st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_strict_json_reads_what_json_writes_and_refuses_a_second_reading(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert parse_object(text.encode()) == document
    name = json.dumps(next(iter(document)))
    with pytest.raises(ValueError, match="not strict JSON"):
        parse_object(f"{text[:-1]}, {name}: 0}}".encode())


@given(st.binary(max_size=60))
def test_strict_json_never_fails_otherwise(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_object(data), dict)


@given(
    st.text(max_size=80) | st.lists(st.binary(max_size=40), min_size=3, max_size=3).map(lambda parts: ".".join(map(b64, parts)))
)
def test_taking_apart_ends_in_a_token_or_a_refusal(text: str) -> None:
    with suppress(Refusal):
        assert take_apart(text).key_id
