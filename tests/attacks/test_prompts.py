"""Attacks with prompts: none, next to none, and too much of one, through the front door: items 21 to 23 of
reference/security.md, 7.3.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from attacks.api_server import ApiServer, api_server, error_of, refusal
from attacks.raw_http import RawConnection, Reply, head
from inferflux_core.serving.openai.schemas import ChatBody

URL = "/v1/chat/completions"
TEN_MIB = 10 * 1024 * 1024
CONTEXT = 256  # tokens; the fake tokenizer makes one of each byte, and puts one before the prompt of a completion


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(autouse=True)
def well_afterwards(server: ApiServer) -> Iterator[None]:
    """Whatever was asked of it, the same engine process answers the next one."""
    yield
    server.assert_well()


# --- 21: next to nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("", 200), ([], 400), ([[]], 400), ([256], 200), ([257, 258, 259], 200), ("</s>", 200), ("\x00", 200), ("\ufeff", 200)],
    ids=repr,
)
def test_21_prompts_of_nothing_and_of_control_tokens(server: ApiServer, prompt: object, status: int) -> None:
    assert server.complete(prompt=prompt).status_code == status


def test_21_a_prompt_without_any_token(server: ApiServer) -> None:
    assert refusal(server.complete(prompt="", add_special_tokens=False)) == (400, None, "prompt")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "system\u0000", "content": "x"}], "messages[0].role"),
        ([{"role": "System", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ""}], None),
        ([{"role": "user", "content": "<|image_pad|>"}], None),
        ([{"role": "user", "content": "<|im_start|><|im_end|></s><s>"}], None),
        ([{"role": "assistant", "content": "", "tool_calls": []}], None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_21_messages_of_nothing_and_of_control_tokens(server: ApiServer, messages: list[Any], param: str | None) -> None:
    reply = server.chat(messages=messages)
    if param is None:
        assert reply.status_code == 200
    else:
        assert refusal(reply) == (400, None, param)


def test_21_what_a_user_spells_is_no_control_token(server: ApiServer) -> None:
    """It is as many tokens as it has bytes, not one."""
    plain, spelt = (
        server.chat(messages=[{"role": "user", "content": text}]).json()["usage"]["prompt_tokens"]
        for text in ("", "<|im_end|>")
    )
    assert spelt == plain + len("<|im_end|>")


# --- 22, 23: long prompts ------------------------------------------------------------------------------------------------


def slowest_probe_during(server: ApiServer, requests: list[bytes]) -> tuple[float, float, list[Reply]]:
    """Send requests one after the other while `/livez` is asked without pause.

    Returns:
        Seconds of the slowest probe before, and of the slowest during; the replies.
    """
    replies: list[Reply] = []

    def attack() -> None:
        for data in requests:
            with RawConnection(server.url) as connection:
                connection.send(data)
                replies.append(connection.reply())

    def probe(connection: RawConnection) -> float:
        began = time.perf_counter()
        connection.send(head("GET", "/livez"))
        assert connection.reply().status == 200
        return time.perf_counter() - began

    with RawConnection(server.url) as connection:
        before = max(probe(connection) for _ in range(50))
        attacker = threading.Thread(target=attack)
        attacker.start()
        during = [probe(connection)]
        while attacker.is_alive():
            during.append(probe(connection))
        attacker.join()
    return before, max(during), replies


def raw(server: ApiServer, path: str, body: bytes) -> bytes:
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}", f"Authorization: Bearer {server.user}")
    return head("POST", path, *lines) + body


def test_22_ten_mebibytes_are_refused_before_they_are_tokenised_and_hold_up_nobody(server: ApiServer) -> None:
    text = b"a " * (TEN_MIB // 2 - 100)
    chat = b'{"model":"open","messages":[{"role":"user","content":"%b"}]}' % text
    completion = b'{"model":"open","prompt":"%b"}' % text
    before, during, replies = slowest_probe_during(server, [raw(server, URL, chat), raw(server, "/v1/completions", completion)])
    print(f"\nslowest /livez: {before * 1000:.1f} ms before, {during * 1000:.1f} ms during")
    assert [(reply.status, reply.error["code"]) for reply in replies] == [(400, "context_length_exceeded")] * 2
    assert all("in any wording" in reply.error["message"] for reply in replies), "it was tokenised"
    assert during < 1 + before, "the budget is 50 ms on an idle machine; this allows for a busy one"


def test_22_more_than_that_is_413(server: ApiServer) -> None:
    assert refusal(server.complete(prompt="a" * TEN_MIB)) == (413, "request_too_large", None)


def test_22_arguments_of_tool_calls_are_bounded_all_together(server: ApiServer) -> None:
    arguments = json.dumps({"a": [[]] * 40_000})
    call = {"function": {"name": "f", "arguments": arguments}}
    reply = server.chat(messages=[{"role": "assistant", "tool_calls": [call] * 3}])
    assert reply.status_code == 400
    assert "too many values" in error_of(reply)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "x", "name": "a" * 10_000}]},
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "a" * 10_000}]},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a" * 10_000}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "a" * 10_000}}]}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":"%s"}' % ("a" * 9000)}}]}
            ]
        },
        {"tools": [{"type": "function", "function": {"name": "f", "description": "a" * 10_000}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"title": "a" * 10_000}}}]},
    ],
    ids=lambda fields: str(fields)[:90],
)
@pytest.mark.parametrize("path", [URL, "/tokenize", "/apply-template"])
def test_22_all_that_the_model_is_told_counts_before_it_is_rendered(
    server: ApiServer, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": "open", "messages": [{"role": "user", "content": "x"}], **fields}
    reply = server.ask("POST", path, body)
    assert refusal(reply) == (400, "context_length_exceeded", "messages")
    assert "in any wording" in error_of(reply)["message"]


_ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [0] * 5000},
        {"messages": [{"role": "user", "content": [0] * 5000}]},
        {"stop": [0] * 5000},
        {"stop_token_ids": ["x"] * 5000},
        {"messages": [{**_ASSISTANT, "tool_calls": [0] * 5000}]},
        {"logit_bias": {str(token): "x" for token in range(5000)}},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_22_of_many_mistakes_only_the_first_is_described(fields: dict[str, Any]) -> None:
    """pydantic describes them all in one piece, while nothing else can run."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": [_ASSISTANT], **fields})
    assert caught.value.error_count() == 1


def test_22_tokenize_refuses_what_no_context_holds(server: ApiServer) -> None:
    reply = server.ask("POST", "/tokenize", {"model": "open", "prompt": "a" * 2**20})
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_23_the_context_exactly_and_one_token_more(server: ApiServer, stream: bool) -> None:
    for prompt, max_tokens in (("a" * 245, 10), ("a" * (CONTEXT - 2), 1), ([97] * (CONTEXT - 1), 1), ("", CONTEXT - 1)):
        served = server.complete(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        assert served.json()["usage"]["total_tokens"] == CONTEXT
        more = server.complete(prompt=prompt, max_tokens=max_tokens + 1, ignore_eos=True, stream=stream)
        assert refusal(more) == (400, "context_length_exceeded", "prompt")
        longer = [97] * len(prompt) + [97, 97]  # of an id list nothing is put in front
        assert refusal(server.complete(prompt=longer, max_tokens=max_tokens, stream=stream))[1] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_23_a_conversation_that_fits_exactly(server: ApiServer, stream: bool) -> None:
    bare = server.chat(messages=[{"role": "user", "content": ""}]).json()["usage"]["prompt_tokens"]

    def ask(length: int, **fields: object) -> Any:
        return server.chat(messages=[{"role": "user", "content": "a" * length}], ignore_eos=True, **fields)

    assert ask(CONTEXT - bare - 5, max_tokens=5).json()["usage"]["total_tokens"] == CONTEXT
    assert ask(CONTEXT - bare - 1, max_tokens=None).json()["usage"]["total_tokens"] == CONTEXT
    assert refusal(ask(CONTEXT - bare - 5, max_tokens=6, stream=stream)) == (400, "context_length_exceeded", "messages")
    assert refusal(ask(CONTEXT - bare, max_tokens=None, stream=stream)) == (400, "context_length_exceeded", "messages")
