"""Attacks on the names of models, through the front door: what may not be seen is not there. Numbers are those of
reference/security.md, 7.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from attacks.api_server import CHAT, ApiServer, api_server, error_of, refusal
from attacks.raw_http import Reply, ask, head
from inferflux_core.access.audit.key_files import AuditPaths, read_key
from inferflux_core.access.audit.verify import verify
from inferflux_core.settings import AuditSettings
from served import until

ABSENT = "absent"
FORGED = '\n{"event":"forged","actor":{"id":"boss"}}'
NAMES = {
    "forbidden": "secret",
    "alias of a forbidden one": "hidden",
    "path": "../../etc/passwd",
    "absolute path": "/etc/passwd",
    "line break": "a\nb",
    "10 kB": "x" * 10_240,
    "10 kB that begins well": "open" + "/" * 10_236,
    "homoglyph": "\u043epen",
    "full width": "\uff4f\uff50\uff45\uff4e",
    "combining": "o\u0308pen",
    "zero width": "op\u200ben",
    "right to left": "\u202eopen",
    "case": "Open",
    "case of an alias": "PUBLIC",
    "space": "open ",
    "NUL": "open\x00",
    "object of the policy": "model/open",
    "pattern": "*",
    "pattern of all": "**",
    "empty": "",
    "quotes": "'\"`",
    "reference": "fake",
    "hub": "hf:owner/repo",
    "forged record": FORGED,
    "escape sequence": "\x1b[2Jopen",
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": CHAT["messages"]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(scope="module")
def narrow(server: ApiServer) -> str:
    """The key of an administrator's role that is for the model `open` only."""
    return server.new_key("boss", models=("open",))[1]


def what_is_told(reply: httpx.Response, name: str) -> tuple[int, str, dict[str, str]]:
    """Status, body with the name taken out, and the headers that are no number of this reply alone."""
    own = {"x-request-id", "openai-processing-ms", "content-length", "date"}
    headers = {key: value for key, value in reply.headers.items() if key not in own}
    error = error_of(reply)
    assert repr(name[:128]) in error["message"]
    error["message"] = error["message"].replace(repr(name[:128]), "NAME")
    return reply.status_code, json.dumps(error), headers


# --- 24, 79: one shape for all that is not there -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_24_and_79_what_may_not_be_seen_is_told_as_what_is_not_there(server: ApiServer, kind: str) -> None:
    name = NAMES[kind]
    for path, body in BODIES.items():
        absent = server.ask("POST", path, {**body, "model": ABSENT})
        assert refusal(absent) == (404, "model_not_found", "model")
        reply = server.ask("POST", path, {**body, "model": name})
        assert what_is_told(reply, name) == what_is_told(absent, ABSENT)
    streamed = server.chat(model=name, stream=True)
    assert what_is_told(streamed, name) == what_is_told(server.chat(model=ABSENT, stream=True), ABSENT)


@pytest.mark.parametrize("name", ["secret", "hidden"])
def test_24_a_list_of_models_in_the_credential_hides_the_others_whatever_the_role(
    server: ApiServer, narrow: str, name: str
) -> None:
    assert server.chat(narrow).json()["model"] == "open"
    for path, body in BODIES.items():
        there, absent = (server.ask("POST", path, {**body, "model": model}, key=narrow) for model in (name, ABSENT))
        assert what_is_told(there, name) == what_is_told(absent, ABSENT)
        assert there.status_code == 404
    listed = server.ask("GET", "/v1/models", key=narrow).json()["data"]
    assert [model["id"] for model in listed] == ["open"]


@pytest.mark.parametrize(
    "target",
    [
        "secret",
        "hidden",
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/secret",
        "./open",
        "open/",
        "open%00",
        "Open",
        "%D0%BEpen",
        "%ff%fe",
        "x" * 10_240,
        "%252e%252e",
    ],
    ids=lambda target: target[:30],
)
def test_24_names_in_the_path(server: ApiServer, target: str) -> None:
    """Sent as they are: a client library would resolve the dots."""

    def get(name: str) -> Reply:
        return ask(server.url, head("GET", f"/v1/models/{name}", f"Authorization: Bearer {server.user}"))

    absent, reply = get(ABSENT), get(target)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert reply.error.keys() == absent.error.keys()
    own = {"x-request-id", "openai-processing-ms", "content-length", "date"}
    assert {key: reply.headers[key] for key in reply.headers.keys() - own} == {
        key: absent.headers[key] for key in absent.headers.keys() - own
    }
    if target in ("secret", "hidden"):
        assert reply.error["message"].replace(target, ABSENT) == absent.error["message"]


def test_24_a_line_break_in_the_path_is_no_name_at_all(server: ApiServer) -> None:
    """No route takes one, so that this 404 is of the URL, whatever models there are."""
    for target in ("a%0Ab", "secret%0Aopen", "%0Aopen"):
        reply = ask(server.url, head("GET", f"/v1/models/{target}", f"Authorization: Bearer {server.user}"))
        assert (reply.status, reply.error["code"]) == (404, None)
        assert reply.error["message"].startswith("Unknown URL")


@pytest.mark.parametrize("path", ["/v1/models/open", "/v1/models", "/healthz", "/metrics", "/v1/admin/api-keys"])
def test_24_a_line_break_behind_a_path_makes_another_path(server: ApiServer, path: str) -> None:
    reply = ask(server.url, head("GET", path + "%0A", f"Authorization: Bearer {server.admin}"))
    assert reply.status == 404


def test_24_a_line_break_is_no_way_past_the_gate(server: ApiServer) -> None:
    for path in ("/livez%0A", "/readyz%0A", "/metrics%0A", "/v1/models%0A", "/v1/admin/api-keys%0A"):
        assert ask(server.url, head("GET", path)).status == 401
    for path in ("/metrics%0A", "/v1/admin/api-keys%0A", "/v1/models/secret%0A"):
        assert ask(server.url, head("GET", path, f"Authorization: Bearer {server.user}")).status in (403, 404)


def test_24_names_that_are_allowed_lead_to_the_one_model(server: ApiServer) -> None:
    for name in ("open", "public", None):
        assert server.chat(model=name).json()["model"] == "open"
    assert server.ask("GET", "/v1/models/public").json()["id"] == "open"
    assert server.chat(server.admin, model="hidden").json()["model"] == "secret"


def test_24_who_may_see_but_not_use_is_told_so_by_every_name(server: ApiServer) -> None:
    """The list of all models says that it is there, so that 403 tells nothing more."""
    _, reader = server.new_key("reader")
    listed = server.ask("GET", "/v1/models", key=reader).json()["data"]
    assert [model["id"] for model in listed] == ["open", "secret"]
    by_name, by_alias = server.chat(reader, model="secret"), server.chat(reader, model="hidden")
    assert refusal(by_name) == (403, "model_not_allowed", "model")
    assert by_alias.text == by_name.text
    assert refusal(server.chat(reader, model=ABSENT)) == (404, "model_not_found", "model")


def test_24_without_the_scope_no_name_tells_anything(server: ApiServer) -> None:
    _, embedder = server.new_key("user", scopes=frozenset({"embed"}))
    texts = {server.chat(embedder, model=name).text for name in ("open", "secret", "hidden", ABSENT, None)}
    assert len(texts) == 1
    assert refusal(server.chat(embedder)) == (403, "insufficient_scope", None)


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/healthz", "/openapi.json", "/v1/admin/models", "/v1/admin/policy", "/v1/admin/config", "/v1/admin/pools"],
)
def test_79_no_other_page_names_a_hidden_model(server: ApiServer, path: str) -> None:
    reply = server.ask("GET", path)
    assert reply.status_code == 403
    for word in ("secret", "hidden"):
        assert word not in reply.text


def test_79_probes_name_no_model(server: ApiServer) -> None:
    for path in ("/livez", "/readyz"):
        reply = ask(server.url, head("GET", path))
        assert reply.status == 200
        assert b"open" not in reply.body
        assert b"secret" not in reply.body


def test_79_a_body_that_is_wrong_is_wrong_whatever_the_model(server: ApiServer) -> None:
    texts = {server.chat(model=name, n=9).text for name in ("open", "secret", "hidden", ABSENT)}
    assert len(texts) == 1


# --- 70, 71: names in logs and metrics -----------------------------------------------------------------------------------


def test_70_hostile_names_and_paths_stay_within_their_line(server: ApiServer) -> None:
    """As models, as paths, as request ids; of the audit log as a whole in test_audit_http.py."""
    hostile = [FORGED, "\x1b[2J", "\u202e\u2066", "\r\nHTTP/1.1 200 OK", "\x00", "\u2028"]
    before = len(server.audit_lines())
    for text in hostile:
        assert server.chat(model=text).status_code == 404
        path = quote(text)
        assert ask(server.url, head("GET", f"/no/{path}", f"Authorization: Bearer {server.user}")).status == 404
        assert ask(server.url, head("GET", f"/no/{path}")).status == 401
        reply = server.ask("GET", "/v1/models", headers={"x-request-id": path})
        assert reply.headers["x-request-id"] != path

    def new_records() -> list[bytes]:
        return server.audit_lines()[before:]

    def own(record: dict[str, object]) -> bool:
        """Whether it is of this test: an answer that an earlier one left may end only now."""
        return record.get("api") != "/v1/chat/completions" or record.get("model_requested") in hostile

    until(lambda: len(new_records()) >= 4 * len(hostile))
    records = [record for line in new_records() if own(record := json.loads(line))]
    assert len(records) == 4 * len(hostile)
    assert {record["event"] for record in records} == {"request.completed", "auth.failed"}
    assert [r["model_requested"] for r in records if "model_requested" in r] == hostile
    for line in new_records():
        assert not {*range(32), 127}.intersection(line)
    assert not any(word in line for line in server.served.log for word in ("\x1b", "\u202e", "\x00", "forged", "\r", "\u2028"))
    paths = AuditPaths.of(AuditSettings(), server.state)
    assert verify(paths.log, key=read_key(paths.key)).ok


def test_70_a_user_agent_of_a_mebibyte(server: ApiServer) -> None:
    reply = ask(server.url, head("GET", "/v1/models", "User-Agent: " + "x" * 2**20, f"Authorization: Bearer {server.user}"))
    assert reply.status == 431


def test_71_names_that_clients_make_up_make_no_metric(server: ApiServer) -> None:
    def series() -> set[str]:
        return set(server.metrics())

    def ask_for(name: str) -> None:
        server.chat(model=name)
        server.chat(model=name, stream=True)
        server.ask("POST", "/tokenize", {"model": name, "prompt": "x"})
        server.ask("GET", f"/v1/models/{name}")
        server.ask("GET", f"/no/{name}")

    for name in ("m0", "m1"):
        ask_for(name)
    before = series()
    for number in range(40):
        ask_for(f"made-up-{number}")
    assert series() == before
    assert not any("made-up" in name for name in before)
