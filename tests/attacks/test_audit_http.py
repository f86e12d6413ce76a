"""The audit log through the front door: one record for whatever becomes of a request, on disk before the answer ends.

Also attacks 62 (a server that is killed), 66 (a full disk) and 70 (injection into the log).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from click.testing import CliRunner

from attacks.access_server import BOSS, POLICY, USER, AccessServer, chat, guarded, next_reply, running
from attacks.raw_http import RawConnection, ask, head
from inferflux_core.access.keys.form import new_key
from inferflux_core.cli.audit import audit
from served import events, until

KEYS = {
    "boss": BOSS,
    "user": USER,
    "guest": {"tenant": "acme", "scopes": ["generate", "read"], "roles": ["guest"]},
    "once": {**USER, "limits": {"rpm": 1}},
}
MARKER = "marker-of-a-prompt-7f3a9"
MODELS = [
    {"source": "fake", "name": "tiny"},
    {"source": "fake:2", "name": "secret"},
    {"source": "fake:3", "name": "slow", "backend_settings": {"step_ms": 10}},
]
SETTINGS: dict[str, Any] = {"models": MODELS, "audit": {"fsync": "each", "required": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccessServer]:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "policy.csv").write_text(POLICY + "p, role:guest, *, model/tiny, read, allow\n")
    with guarded(folder, KEYS, **SETTINGS) as found:
        yield found


def messages(text: str = MARKER) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- one record for each outcome --------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
DENIED = {"effect": "deny", "engine": "casbin", "object": "model/secret", "action": "generate"}
ALLOWED = {"effect": "allow", "engine": "casbin", "object": "model/tiny", "action": "generate"}
TOKENS = {"tokens_in": 0, "tokens_out": 0, "finish_reason": ""}

# whose key, method, path, options of httpx; event, status, and further fields of the record
OUTCOMES: dict[str, tuple[str | None, str, str, dict[str, Any], str, int, dict[str, Any]]] = {
    "an answer": (
        "user", "POST", CHAT, {"json": chat(messages=messages())}, "request.completed", 200,
        {"api": CHAT, "model": "tiny", "model_requested": "tiny", "stream": False, "tokens_in": len(MARKER) + 19,
         "tokens_out": 4, "finish_reason": "length", "ended_by": "server", "decision": ALLOWED, "error": None},
    ),
    "a stream": (
        "user", "POST", CHAT, {"json": chat(messages=messages(), stream=True)}, "request.completed", 200,
        {"stream": True, "tokens_in": len(MARKER) + 19, "tokens_out": 4, "finish_reason": "length", "decision": ALLOWED},
    ),
    "no credential": (None, "GET", "/v1/models", {}, "auth.failed", 401, {"reason": "missing", "error": "invalid_api_key"}),
    "a credential of nobody": (
        None, "POST", CHAT, {"json": chat(messages=messages()), "headers": {"x-api-key": new_key()[1]}}, "auth.failed", 401,
        {"auth_method": "none", "error": "invalid_api_key"},
    ),
    "an unknown URL without a credential": (None, "GET", "/no/such/url", {}, "auth.failed", 401, {"api": "unmatched"}),
    "two credentials": ("user", "GET", "/v1/models", {"headers": {"x-api-key": "x"}}, "request.completed", 400,
                        {"error": "multiple_credentials"}),
    "no permission": ("user", "GET", "/v1/admin/api-keys", {}, "policy.denied", 403,
                      {"decision": {"effect": "deny", "engine": "scopes", "object": "api/keys", "action": "admin"}}),
    "a model to look at only": (
        "guest", "POST", CHAT, {"json": chat(messages=messages())}, "policy.denied", 403,
        {"decision": {**ALLOWED, "effect": "deny"}, "error": "model_not_allowed", **TOKENS},
    ),
    "a hidden model": (
        "user", "POST", CHAT, {"json": chat(model="secret", messages=messages())}, "policy.denied", 404,
        {"decision": DENIED, "error": "model_not_found", "model_requested": "secret", **TOKENS},
    ),
    "a missing model": (
        "user", "POST", CHAT, {"json": chat(model="absent", messages=messages())}, "request.completed", 404,
        {"error": "model_not_found", "model_requested": "absent", "model": "", **TOKENS},
    ),
    "an unknown URL": ("user", "GET", "/no/such/url", {}, "request.completed", 404,
                       {"api": "unmatched", "path": "/no/such/url"}),
    "a wrong method": ("user", "DELETE", "/v1/models", {}, "request.completed", 405, {}),
    "a malformed body": ("user", "POST", CHAT, {"content": b'{"model":', "headers": {"content-type": "application/json"}},
                         "request.completed", 400, {"error": "invalid_json"}),
    "a value out of range": ("user", "POST", CHAT, {"json": chat(messages=messages(), n=0)}, "request.completed", 400, {}),
    "a prompt too long": (
        "user", "POST", CHAT, {"json": chat(messages=messages(MARKER * 300))}, "request.completed", 400,
        {"error": "context_length_exceeded", "decision": ALLOWED, **TOKENS},
    ),
    "no JSON": ("user", "POST", CHAT, {"content": MARKER, "headers": {"content-type": "text/plain"}},
                "request.completed", 415, {}),
}  # fmt: skip


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_leaves_one_record(server: AccessServer, outcome: str) -> None:
    name, method, path, options, event, status, fields = OUTCOMES[outcome]
    key = server.keys[name] if name else None
    request_id, before = uuid.uuid4().hex, server.records()[-1]["seq"]
    headers = {**(key.headers if key else {}), **options.get("headers", {}), "x-request-id": request_id}
    reply = httpx.request(method, server.url + path, **{**options, "headers": headers}, timeout=20)
    assert (reply.status_code, reply.headers["x-request-id"]) == (status, request_id)
    (record,) = [record for record in server.records() if record["seq"] > before]  # at once: it was on disk first
    assert (record["event"], record["status"], record["request_id"], record["method"]) == (event, status, request_id, method)
    assert record["address"] == "127.0.0.1"
    known = key is not None and outcome != "two credentials"
    actor = {"kind": "key", "id": key.id, "tenant": KEYS[str(name)]["tenant"], "name": name} if known and key else None
    assert record["actor"] == (actor or {"kind": "anonymous", "id": "anonymous", "tenant": "default"})
    decision = {k: v for k, v in record.get("decision", {}).items() if k not in ("rule", "version")}
    assert {k: decision if k == "decision" else record.get(k) for k in fields} == fields


def test_a_body_that_is_too_large_leaves_one_record(server: AccessServer) -> None:
    before = server.records()[-1]["seq"]
    assert server.chat("user", messages=messages(MARKER * 500_000)).status_code == 413
    until(lambda: server.records()[-1]["seq"] > before, 5)
    (record,) = [record for record in server.records() if record["seq"] > before]
    assert (record["event"], record["status"], record["error"]) == ("request.completed", 413, "request_too_large")


def test_a_refusal_before_the_body_came_is_on_record_when_it_is_whole(server: AccessServer) -> None:
    before, secret = server.records()[-1]["seq"], server.keys["user"].secret
    lines = ("Content-Type: application/json", "Content-Length: 20000000", f"X-API-Key: {secret}")
    with RawConnection(server.url) as connection:
        connection.send(head("POST", CHAT, *lines))
        assert connection.reply().status == 413
        assert server.records()[-1]["seq"] > before


def test_a_quota_that_is_used_up_leaves_one_record(server: AccessServer) -> None:
    assert server.chat("once").status_code == 200
    before = server.records()[-1]["seq"]
    assert server.chat("once", messages=messages()).status_code == 429
    (record,) = [record for record in server.records() if record["seq"] > before]
    found = {key: record[key] for key in ("event", "status", "ended_by", "error", "tokens_in", "tokens_out")}
    refused = {"event": "request.completed", "status": 429, "ended_by": "limit", "error": "rate_limit_exceeded"}
    assert found == {**refused, "tokens_in": 0, "tokens_out": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_one_record(server: AccessServer, stream: bool) -> None:
    before, body = server.records()[-1]["seq"], chat(model="slow", max_tokens=2000, ignore_eos=True, messages=messages())
    with server.client("user") as client:
        if stream:
            with client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
                next(events(reply.iter_lines()))
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=0.3)
    until(lambda: server.records()[-1]["seq"] > before, 5)
    (record,) = [record for record in server.records() if record["seq"] > before]
    found = {key: record[key] for key in ("event", "status", "ended_by", "stream", "finish_reason")}
    assert found == {"event": "request.completed", "status": 499, "ended_by": "client", "stream": stream, "finish_reason": ""}
    assert 0 < record["tokens_out"] < 2000


def test_a_change_by_an_administrator_is_recorded_before_its_answer(server: AccessServer) -> None:
    before = server.records()[-1]["seq"]
    made = server.ask("boss", "POST", "/v1/admin/api-keys", json={"name": "made by the boss"})
    assert made.status_code in (200, 201)
    change, request = [record for record in server.records() if record["seq"] > before]
    assert (change["event"], request["event"]) == ("key.created", "request.completed")
    assert change["request_id"] == request["request_id"] == made.headers["x-request-id"]
    assert change["actor"]["id"] == request["actor"]["id"] == server.keys["boss"].id
    secret = str(next(value for value in made.json().values() if isinstance(value, str) and value.startswith("ifx_")))
    assert secret.rpartition("_")[2] not in server.audit_log.read_text()


def test_a_policy_that_was_rejected_and_one_that_was_taken_are_recorded(server: AccessServer) -> None:
    good, before = server.policy.read_text(), server.records()[-1]["seq"]

    def events_since() -> list[str]:
        return [record["event"] for record in server.records() if record["seq"] > before]

    server.policy.write_text(good + "P, x\n")
    until(lambda: "policy.rejected" in events_since(), 5)
    server.policy.write_text(good)
    until(lambda: "policy.reloaded" in events_since(), 5)
    assert events_since() == ["policy.rejected", "policy.reloaded"]


# --- 70: injection ----------------------------------------------------------------------------------------------------

FORGED = '{"event":"forged"}'


def test_70_nobody_writes_a_line_of_his_own(server: AccessServer) -> None:
    before, secret = server.records()[-1]["seq"], server.keys["user"].secret
    evil = "\x1b[31m\u202e\u2028\n" + FORGED
    body = json.dumps(chat(model=evil)).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}", f"X-API-Key: {secret}")
    for data in (
        head("GET", "/no%0a" + FORGED.replace('"', "%22") + "%1b[31m%e2%80%ae%00", f"X-API-Key: {secret}"),
        head("GET", "/no", f"X-API-Key: {secret}", "User-Agent: \x9b31m" + FORGED, f"X-Request-Id: {FORGED}"),
        head("GET", "/no", "X-API-Key: ifx_live_" + FORGED),
        head("GET", "/no" + "%0a" * 3000, f"X-API-Key: {secret}"),
        head("POST", CHAT, *lines) + body,
    ):
        assert ask(server.url, data).status in (401, 404)
    data = server.audit_log.read_bytes()
    assert set(data) <= {*range(32, 127), 10}, "nothing but printable ASCII and the ends of lines"
    records = [record for record in server.records() if record["seq"] > before]
    assert [record["event"] for record in records] == ["request.completed"] * 2 + ["auth.failed"] + ["request.completed"] * 2
    assert records[0]["path"] == "/no\n" + FORGED + "\x1b[31m\u202e\0"
    assert all(len(record["request_id"]) == 32 for record in records)
    assert len(records[3]["path"]) == 128
    assert records[4]["model_requested"] == evil
    with RawConnection(server.url) as connection:
        connection.send(head("GET", "/no", f"X-API-Key: {secret}", "User-Agent: " + "\x9b" * 2**20))
        assert connection.reply().status == 431


# --- 66: a full disk --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(server: AccessServer) -> Iterator[None]:
    """No file of the server may grow beyond the size that the audit log has now."""
    pid, size = server.served.process.pid, server.audit_log.stat().st_size
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_66_what_cannot_be_recorded_is_not_answered(server: AccessServer) -> None:
    whole = chat(model="slow", max_tokens=30, ignore_eos=True)
    with server.client("user") as client, client.stream("POST", CHAT, json={**whole, "stream": True}) as stream:
        chunks = stream.iter_lines()
        next(chunks)
        with full_disk(server):
            unavailable(client.post(CHAT, json=whole))  # the first to find out, after its answer was made
            *_, last, end = chunks
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "audit_unavailable", "and no [DONE]"
            assert end == ""
            unavailable(client.post(CHAT, json=whole))
            unavailable(client.get("/v1/models"))
            unavailable(server.ask("boss", "GET", "/v1/admin/policy"))
            assert httpx.get(server.url + "/livez").status_code == 200
        until(lambda: client.get("/v1/models").status_code == 200, 10)
        reply = client.post(CHAT, json=whole)
        assert reply.status_code == 200
    records = server.records()
    resumed = max(index for index, record in enumerate(records) if record["event"] == "log.resumed")
    assert records[resumed]["error"] == "EFBIG"
    waiting = [record for record in records if record.get("model") == "slow"][-3:]
    assert sorted(record["stream"] for record in waiting[:2]) == [False, True], "those that had waited"
    assert records[-1]["request_id"] == reply.headers["x-request-id"]
    assert not any("Traceback" in line for line in server.served.log)
    assert server.verified().ok


def unavailable(reply: httpx.Response) -> None:
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "audit_unavailable")
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["x-request-id"]


# --- nothing of a prompt, nothing of a secret -------------------------------------------------------------------------


def test_no_prompt_and_no_secret_is_in_any_file_or_log_line(server: AccessServer) -> None:
    """Comes after all of the above, which sent the marker in each way."""
    assert server.chat("user", messages=messages()).status_code == 200
    words = [MARKER, *(key.secret.split("_")[3] for key in server.keys.values())]
    files = [path for path in (server.folder / "state").rglob("*") if path.is_file()]
    assert len(files) >= 4
    texts = [path.read_bytes().decode("latin-1") for path in files] + ["".join(server.served.log)]
    assert [word for word in words for text in texts if word in text] == []
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


# --- 62: kill -9 ------------------------------------------------------------------------------------------------------


async def _load(server: AccessServer, answered: list[str], enough: asyncio.Event) -> None:
    url = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            writer.write(server.chat_bytes("user", max_tokens=2, messages=messages()))
            reply = await next_reply(reader)
            assert reply.status == 200
            answered.append(reply.headers["x-request-id"])
            if len(answered) >= 150:
                enough.set()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def test_62_after_kill_9_under_load_every_answer_is_on_record(tmp_path: Path) -> None:
    answered: list[str] = []

    async def kill(server: AccessServer) -> None:
        enough = asyncio.Event()
        tasks = [asyncio.create_task(_load(server, answered, enough)) for _ in range(8)]
        await enough.wait()
        server.served.process.send_signal(signal.SIGKILL)
        await asyncio.gather(*tasks)

    with guarded(tmp_path, {"user": USER}, models=MODELS[:1], audit={"fsync": "each", "checkpoint_records": 40}) as server:
        asyncio.run(kill(server))
        assert server.served.process.wait(10) == -signal.SIGKILL
    with running(tmp_path, server.keys, models=MODELS[:1], audit={"fsync": "each"}) as again:
        assert again.chat("user").status_code == 200, "the store is whole as well"
        records = again.records()
        assert set(answered) <= {record.get("request_id") for record in records}
        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        assert again.served.terminate() == 0
    assert again.records()[-1]["event"] == "server.stop"
    found = CliRunner().invoke(audit, ["verify", "--json", "--state-dir", str(tmp_path / "state")])
    assert found.exit_code == 0, found.output
    verified = json.loads(found.output)
    assert (verified["ok"], verified["head"]) == (True, len(again.records()))
    assert verified["signed_to"] == verified["head"], "the last checkpoint is of the end"
