"""`/v1/admin/policy`: what is read, what is refused, and that a refused policy changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.serving.admin.administered import HELLO, POLICY, TESTS, Administered, administered, refused
from inferflux_core.access.policy.casbin_policy import Policy
from inferflux_core.serving.admin import policy as policy_routes
from inferflux_core.serving.admin.policy import MAX_CASES

PATH = "/v1/admin/policy"
MORE = POLICY + "p, role:user, *, model/second, generate, deny\n"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Administered]:
    async with administered(tmp_path) as running:
        yield running


async def test_the_policy_in_force_is_shown_with_its_version(server: Administered) -> None:
    response = await server.ask("GET", PATH)
    shown = response.json()
    assert (shown["policy"], shown["file_problems"]) == (POLICY, None)
    assert response.headers["etag"] == f'"{shown["version"]}"'


@pytest.mark.parametrize("as_text", [True, False])
async def test_a_new_policy_is_in_force_and_in_the_file_as_it_was_sent(server: Administered, as_text: bool) -> None:
    before = (await server.ok("GET", PATH))["version"]
    text = MORE.replace("\n", "\r\n") + "# ä\r\n"
    if as_text:
        headers = {"content-type": "text/csv; charset=utf-8"}
        answer = await server.ok("PUT", PATH, match=before, content=text.encode(), headers=headers)
    else:
        answer = await server.ok("PUT", PATH, {"policy": text}, match=before)
    assert answer["policy"] == text
    assert server.policy_file.read_bytes() == text.encode()
    chat = await server.ask("POST", "/v1/chat/completions", {**HELLO, "model": "second"}, key=server.user_key)
    refused(chat, 403, "model_not_allowed")
    [event] = server.audit.events
    assert event["event"] == "policy.replaced"
    assert (event["before"], event["version"]) == (before, answer["version"])
    assert (event["added"], event["removed"]) == (["p, role:user, *, model/second, generate, deny"], [])


async def test_a_refused_policy_changes_nothing(server: Administered) -> None:
    version = (await server.ok("GET", PATH))["version"]
    wrong = POLICY + "p, role:usr, *, model/*, generate, deny\n"
    refused(await server.ask("PUT", PATH, {"policy": wrong}, match=version), 400, "policy_invalid", "line 6", "role:usr")
    failing = POLICY.replace("p, role:boss, *, **, admin, allow\n", "p, role:boss, *, api/policy, admin, allow\n")
    refused(await server.ask("PUT", PATH, {"policy": failing}, match=version), 400, "policy_invalid", "api/keys")
    refused(await server.ask("PUT", PATH, {"policy": ""}, match=version), 400, "policy_invalid", "empty")
    refused(await server.ask("PUT", PATH, {"policy": MORE}), 428, "version_required")
    refused(await server.ask("PUT", PATH, {"policy": MORE}, match="0123456789abcdef"), 412, "version_mismatch")
    refused(await server.ask("PUT", PATH, {"text": MORE}, match=version), 400, None, "Unknown parameter: 'text'")
    assert server.policy_file.read_text() == POLICY
    assert (await server.ok("GET", PATH))["version"] == version
    assert server.audit.events == []
    for reply in (await server.ask("PUT", PATH, {"policy": wrong}, match=version),):
        assert str(server.policy_file) not in reply.text


async def test_a_check_says_what_a_candidate_would_change(server: Administered) -> None:
    answer = await server.ok("POST", f"{PATH}/check", {"policy": MORE.replace("role, user\n", "role, user\nrole, guest\n")})
    assert answer["ok"]
    assert answer["added"] == ["p, role:user, *, model/second, generate, deny", "role, guest"]
    assert answer["removed"] == []
    bad = await server.ok("POST", f"{PATH}/check", {"policy": "p, role:x, *, model/*, generate, Deny\n"})
    assert not bad["ok"]
    assert bad["problems"][0]["line"] == 1
    failing = await server.ok("POST", f"{PATH}/check", {"policy": POLICY.replace("**", "api/policy")})
    assert not failing["ok"]
    assert "test of 'tests.csv' fails" in failing["problems"][0]["message"]
    assert server.policy_file.read_text() == POLICY


async def test_cases_are_run_against_the_policy_in_force_or_a_candidate(server: Administered) -> None:
    cases = TESTS + "role:user,default,model/second,generate,deny\n"
    answer = await server.ok("POST", f"{PATH}/test", {"cases": cases})
    assert (answer["ok"], answer["cases"], len(answer["failures"])) == (False, 3, 1)
    assert "line 4" in answer["failures"][0]
    assert (await server.ok("POST", f"{PATH}/test", {"cases": cases, "policy": MORE}))["failures"] == []
    own = await server.ok("POST", f"{PATH}/test", {})
    assert (own["ok"], own["cases"], own["failures"]) == (True, None, [])
    refused(await server.ask("POST", f"{PATH}/test", {"cases": "a,b\n"}), 400, "policy_invalid", "line 1")


async def test_there_is_a_most_of_cases(server: Administered) -> None:
    case = "role:user,default,model/fake,generate,allow\n"
    answer = await server.ok("POST", f"{PATH}/test", {"cases": case * MAX_CASES})
    assert (answer["ok"], answer["cases"]) == (True, MAX_CASES)
    too_many = await server.ask("POST", f"{PATH}/test", {"cases": case * (MAX_CASES + 1)})
    refused(too_many, 400, None, "2001 cases", "2000", "split it")


async def test_policies_are_read_and_tested_off_the_event_loop(server: Administered, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, threading.Thread] = {}

    def watched(owner: object, name: str) -> None:
        work = getattr(owner, name)

        def watch(*values: Any) -> Any:
            threads[name] = threading.current_thread()
            return work(*values)

        monkeypatch.setattr(owner, name, watch)

    for name in ("check_policy", "read_cases", "run_cases", "_difference"):
        watched(policy_routes, name)
    watched(Policy, "compile")
    watched(Policy, "explain")
    await server.ok("POST", f"{PATH}/check", {"policy": MORE})
    await server.ok("POST", f"{PATH}/test", {"cases": TESTS, "policy": MORE})
    await server.ok("POST", f"{PATH}/explain", {"subject": "key:x", "object": "model/fake", "action": "read"})
    assert set(threads) == {"check_policy", "read_cases", "run_cases", "_difference", "compile", "explain"}
    assert threading.current_thread() not in threads.values()


async def test_a_star_replaces_what_is_in_force_when_it_is_written(server: Administered) -> None:
    texts = [POLICY + f"# {number}\n" for number in range(3)]
    replies = await asyncio.gather(*(server.ask("PUT", PATH, {"policy": text}, match="*") for text in texts))
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert server.policy_file.read_text() in texts
    steps = {event["before"]: event["version"] for event in server.audit.events}
    assert len(steps) == 3
    assert len(set(steps) - set(steps.values())) == 1  # one after the other, as they were replaced


async def test_a_decision_is_explained_as_the_request_would_meet_it(server: Administered) -> None:
    asked = {"subject": "key:nobody", "roles": ["user"], "object": "model/fake", "action": "generate"}
    answer = await server.ok("POST", f"{PATH}/explain", asked)
    assert (answer["allowed"], answer["engine"]) == (True, "casbin")
    assert answer["rule"] == "line 4: p, role:user, *, model/*, generate, allow"
    assert answer["policy"]["roles"] == [{"role": "role:user", "via": "credential", "effective": True}]
    denied = await server.ok("POST", f"{PATH}/explain", {**asked, "roles": []})
    assert (denied["allowed"], denied["rule"]) == (False, None)
    assert denied["policy"]["nearest"]


async def test_the_decision_about_a_key_counts_its_scopes_too(server: Administered) -> None:
    key = await server.ok("POST", "/v1/admin/api-keys", {"name": "r", "scopes": ["read"], "roles": ["user"]})
    answer = await server.ok("POST", f"{PATH}/explain", {"key": key["id"], "object": "model/fake", "action": "generate"})
    assert (answer["allowed"], answer["engine"]) == (False, "scopes")
    assert answer["policy"]["decision"]["allowed"]
    refused(
        await server.ask("POST", f"{PATH}/explain", {"key": "nope", "object": "model/x", "action": "read"}), 404, "not_found"
    )
    refused(await server.ask("POST", f"{PATH}/explain", {"object": "model/x", "action": "read"}), 400, None, "exactly one")
    both = {"key": key["id"], "subject": "x", "object": "model/x", "action": "read"}
    refused(await server.ask("POST", f"{PATH}/explain", both), 400, None, "exactly one")


async def test_a_reload_takes_a_good_file_and_refuses_a_bad_one(server: Administered) -> None:
    server.policy_file.write_text(MORE)
    answer = await server.ok("POST", f"{PATH}/reload")
    assert answer["policy"] == MORE
    server.policy_file.write_text(MORE + "P, x\n")
    refused(await server.ask("POST", f"{PATH}/reload"), 400, "policy_invalid", "line 7")
    shown = await server.ok("GET", PATH)
    assert (shown["policy"], shown["file_problems"][0]["line"]) == (MORE, 7)
    assert server.audit.names() == ["policy.reload_requested"]


async def test_a_server_without_a_policy_file(tmp_path: Path) -> None:
    async with administered(tmp_path, policy={}) as server:
        for method, path in (("GET", PATH), ("POST", f"{PATH}/reload")):
            refused(await server.ask(method, path), 503, "policy_store_disabled", "policy.file")
        refused(await server.ask("PUT", PATH, {"policy": POLICY}, match="*"), 503, "policy_store_disabled")
        key = await server.ok("POST", "/v1/admin/api-keys", {"name": "r", "scopes": ["read"]})
        answer = await server.ok("POST", f"{PATH}/explain", {"key": key["id"], "object": "model/fake", "action": "read"})
        assert (answer["allowed"], answer["policy"]) == (True, None)
