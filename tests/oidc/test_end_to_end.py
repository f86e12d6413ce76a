"""From nothing to an answer: a real provider, `inferflux serve` that believes it, and `inferctl` that logs in."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from inferflux_core.cli.inferctl import inferctl
from oidc.hostile_provider import INTROSPECTION, hostile_provider
from oidc.login_case import log_in, private_state
from oidc.real_provider import RealProvider, real_provider
from oidc.tokens import b64, claims, header, rsa_key, sign, token
from served import ServedInferFlux, serving

POLICY = """\
role, user
p, role:user, t1, model/fake, generate, allow
p, role:user, *, api/models, read, allow
"""


@pytest.fixture(scope="module")
def issuer() -> Iterator[RealProvider]:
    with real_provider() as provider:
        yield provider


@pytest.fixture(scope="module")
def served(issuer: RealProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedInferFlux]:
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "policy.csv").write_text(POLICY, encoding="utf-8")
    config = {
        "server": {"public_url": f"http://127.0.0.1:{port}"},
        "models": [{"source": "fake", "name": "fake"}, {"source": "fake", "name": "other"}],
        "auth": {"providers": ["api_keys", "oidc"], "settings": {"oidc": {"issuers": [{"issuer": issuer.url}]}}},
        "policy": {"file": str(folder / "policy.csv")},
        "state_dir": str(folder / "state"),
    }
    (folder / "inferflux.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    with serving("--config", str(folder / "inferflux.yaml"), "--port", str(port)) as server:
        yield server


def test_a_stranger_is_told_where_to_log_in(served: ServedInferFlux, issuer: RealProvider) -> None:
    reply = httpx.get(served.url + "/v1/models")
    metadata = f"{served.url}/.well-known/oauth-protected-resource"
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, f'Bearer resource_metadata="{metadata}"')
    assert httpx.get(metadata).json() == {
        "resource": served.url,
        "authorization_servers": [issuer.url],
        "scopes_supported": ["infer:admin", "infer:embed", "infer:generate", "infer:read"],
        "bearer_methods_supported": ["header"],
        "resource_name": "InferFlux",
    }


def test_login_then_everything_that_the_policy_allows(
    served: ServedInferFlux, issuer: RealProvider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private_state(monkeypatch, tmp_path)
    result, _ = log_in(monkeypatch, served.url, lambda count, uri: issuer.sign_in(uri) if count == 1 else None)
    assert result.exit_code == 0, result.output

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(inferctl, ["--url", served.url, *arguments])
        return result.exit_code, result.output

    code, output = run("models", "--json")
    # `infer:read` is not among the scopes that this provider grants, and `generate` shows what may be used.
    assert (code, [card["id"] for card in json.loads(output)]) == (0, ["fake"])
    assert run("chat", "--max-tokens", "3", "hello")[0] == 0
    code, output = run("chat", "--model", "other", "hello")
    assert (code, "does not exist" in output) == (1, True)
    assert run("logout")[0] == 0
    code, output = run("models")
    assert (code, "inferctl login" in output) == (1, True)


JUNK = {
    "no JSON": "a.b.c",
    "empty objects": "e30.e30.x",
    "alg none": ".".join((b64(json.dumps(header(alg="none")).encode()), b64(b"{}"), "x")),
    "nested deeply": ".".join((b64(json.dumps(header()).encode()), b64(b"[" * 9000), "x")),
    "as long as a JWT may be": f"e30.{'x' * 16_000}.x",
    "encrypted": "e30.x.x.x.x",
    "opaque": "junk",
    "long and opaque": "x" * 5000,
    "not of a token's letters": 'jun"k\\',
    "Latin-1": "caf\xe9",
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_an_invalid_token(served: ServedInferFlux, name: str) -> None:
    _expect_invalid_token(served.url, JUNK[name])


def test_junk_is_an_invalid_token_where_the_issuer_is_asked_and_will_not_look_at_it(tmp_path: Path) -> None:
    with hostile_provider() as issuer:
        entry = {
            "issuer": issuer.url,
            "audiences": ["here"],
            "introspection": {"client_id": "rs", "client_secret": "s3cret"},
        }
        config = {
            "models": [{"source": "fake", "name": "fake"}],
            "auth": {"providers": ["oidc"], "settings": {"oidc": {"issuers": [entry]}}},
            "state_dir": str(tmp_path / "state"),
        }
        (tmp_path / "inferflux.yaml").write_text(json.dumps(config), encoding="utf-8")
        with serving("--config", str(tmp_path / "inferflux.yaml")) as server:
            issuer.replies[INTROSPECTION] = issuer.body(b'{"error":"invalid_request"}', status=400)
            for number in range(7):  # more than failures of the issuer would be
                _expect_invalid_token(server.url, f"junk{number}")
            stranger = sign(header(kid="unknown"), claims(issuer.url), rsa_key("unknown"))
            for text in (stranger, token(issuer.url)[:-8] + "AAAAAAAA"):
                _expect_invalid_token(server.url, text)
            assert issuer.fetches(INTROSPECTION) == 7
            issuer.replies[INTROSPECTION] = issuer.body(b"", status=500)
            reply = _get(server.url, "another")
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "auth_unavailable")


def _get(url: str, token: str) -> httpx.Response:
    return httpx.get(url + "/v1/models", headers={"authorization": f"Bearer {token}".encode("latin-1")})


def _expect_invalid_token(url: str, token: str) -> None:
    reply = _get(url, token)
    assert reply.status_code == 401, reply.text
    assert 'error="invalid_token"' in reply.headers["www-authenticate"]
    assert token not in reply.text


def test_a_token_for_something_else_is_refused_and_one_without_the_scope_told_so(
    served: ServedInferFlux, issuer: RealProvider
) -> None:
    def get(path: str, token: str) -> httpx.Response:
        return httpx.get(served.url + path, headers={"authorization": f"Bearer {token}"})

    elsewhere = get("/v1/models", issuer.client_credentials("https://other.example.com"))
    assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (401, "invalid_api_key")
    assert 'error="invalid_token"' in elsewhere.headers["www-authenticate"]
    token = issuer.client_credentials(served.url, "infer:generate")
    assert get("/v1/models", token).status_code == 200
    denied = get("/v1/admin/api-keys", token)
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "insufficient_scope")
    assert denied.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="infer:admin"'
    # The scope alone is not enough: the policy gives nobody `admin`.
    denied = get("/v1/admin/api-keys", issuer.client_credentials(served.url, "infer:generate infer:admin"))
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "policy_denied")
