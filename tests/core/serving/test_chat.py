"""Chat completions on the wire: exact bodies, exact bytes, and what reaches the pipeline."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from core.serving.conformance import conforms, needs_document
from core.serving.scripted import CHAT, HELLO, STARTED, USAGE, entry, stand
from inferflux_core.errors import EngineRestartedError, OverloadedError
from inferflux_core.serving.generation import Delta, Done, Usage

URL = "/v1/chat/completions"
WIRE_USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 3,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 1},
}


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event; the end mark as text."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    payloads = [block.removeprefix("data: ") for block in blocks]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


async def test_whole_answer() -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, json=CHAT)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "fp_test",
        "choices": [
            {
                "index": 0,
                "message": {"content": "Hello", "role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": WIRE_USAGE,
    }
    assert s.pipeline.completed == 0, "the generator is closed after Done, not run on"
    assert s.pipeline.closed.is_set()


async def test_ids_differ() -> None:
    s = stand()
    async with s.client() as client:
        ids = {(await client.post(URL, json=CHAT)).json()["id"] for _ in range(20)}
    assert len(ids) == 20


@pytest.mark.parametrize("include_usage", [False, True])
async def test_stream_bytes(include_usage: bool) -> None:
    s = stand()
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    async with s.client() as client:
        response = await client.post(URL, json={**CHAT, "stream": True, **options})
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    head = (
        f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},"model":"tiny",'
        '"system_fingerprint":"fp_test","choices":['
    )
    end = ',"usage":null}\n\n' if include_usage else "}\n\n"
    usage = json.dumps(WIRE_USAGE, separators=(",", ":"))
    assert response.text == (
        head + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' + end
        + head + '{"index":0,"delta":{"content":"Hel"},"logprobs":null,"finish_reason":null}]' + end
        + head + '{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":null}]' + end
        + head + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]' + end
        + (head + f'],"usage":{usage}}}\n\n' if include_usage else "")
        + "data: [DONE]\n\n"
    )  # fmt: skip
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


async def test_choices_are_told_apart() -> None:
    script = (STARTED, Delta(1, "b"), Delta(0, "a"), Delta(1, "", finish_reason="length"), Delta(0, "!", finish_reason="stop"))
    s = stand(*script, Done(USAGE))
    async with s.client() as client:
        whole = (await client.post(URL, json={**CHAT, "n": 2})).json()
        streamed = events(await client.post(URL, json={**CHAT, "n": 2, "stream": True}))
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "a!", "stop"),
        (1, "b", "length"),
    ]
    assert [(c["index"], c["delta"], c["finish_reason"]) for chunk in streamed[:-1] for c in chunk["choices"]] == [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "b"}, None),
        (0, {"content": "a"}, None),
        (1, {}, "length"),
        (0, {"content": "!"}, None),
        (0, {}, "stop"),
    ]


async def test_text_is_escaped_in_chunks() -> None:
    text = 'a"\\\n\x00\u2028é😀'
    s = stand(STARTED, Delta(0, text, finish_reason="stop"), Done(Usage()))
    async with s.client() as client:
        chunks = events(await client.post(URL, json={**CHAT, "stream": True}))
    assert chunks[1]["choices"][0]["delta"]["content"] == text


async def test_logprobs() -> None:
    tokens = [entry("Hi", -0.1, ("Hi", -0.1), ("Yo", float("-inf"))), entry("é", -2.0, ("e", -1.0))]
    s = stand(STARTED, Delta(0, "Hié", tokens, "stop"), Done(USAGE))
    async with s.client() as client:
        whole = (await client.post(URL, json={**CHAT, "logprobs": True, "top_logprobs": 2})).json()
        streamed = events(await client.post(URL, json={**CHAT, "logprobs": True, "stream": True}))
    expected = {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.1,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.1, "bytes": [72, 105]},
                    {"token": "Yo", "logprob": -9999.0, "bytes": [89, 111]},
                ],
            },
            {
                "token": "é",
                "logprob": -2.0,
                "bytes": [195, 169],
                "top_logprobs": [{"token": "e", "logprob": -1.0, "bytes": [101]}],
            },
        ],
        "refusal": None,
    }
    assert whole["choices"][0]["logprobs"] == expected
    assert [chunk["choices"][0]["logprobs"] for chunk in streamed[:-1]] == [None, expected, None]
    assert [request.logprobs for _, request in s.pipeline.requests] == [2, 0]


async def test_logprobs_of_a_token_without_text_are_not_lost() -> None:
    s = stand(STARTED, Delta(0, "", [entry("\ufffd", -1.0)]), Delta(0, "é", [entry("\ufffd", -2.0)], "stop"), Done(USAGE))
    async with s.client() as client:
        chunks = events(await client.post(URL, json={**CHAT, "logprobs": True, "stream": True}))
    sent = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert [c["delta"].get("content") for c in sent] == ["", "é", None]
    assert [c["logprobs"] and c["logprobs"]["content"][0]["logprob"] for c in sent] == [-1.0, -2.0, None]


async def test_every_field_reaches_the_pipeline() -> None:
    s = stand()
    sampling = {
        "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "repeat_penalty": 1.5, "frequency_penalty": -2,
        "presence_penalty": 2, "seed": -5, "min_tokens": 1, "stop_token_ids": [3], "ignore_eos": True, "priority": -1,
        "cache_salt": "salt", "add_special_tokens": False, "skip_special_tokens": False, "n": 1,
    }  # fmt: skip
    body = {**CHAT, **sampling, "model": "tiny", "max_tokens": 5, "max_completion_tokens": 9, "stop": "END"}
    async with s.client() as client:
        headers = {"x-request-id": "abc.1"}
        response = await client.post(URL, json={**body, "logit_bias": {"5": 500, "6": -0.5}}, headers=headers)
    assert response.status_code == 200
    context, request = s.pipeline.requests[0]
    assert (context.endpoint, context.request_id) == (URL, "abc.1")
    assert context.deadline - context.arrival == pytest.approx(600.0)
    sampling["repetition_penalty"] = sampling.pop("repeat_penalty")
    assert {name: getattr(request, name) for name in sampling} == sampling
    assert (request.model, request.max_tokens, request.stop, request.logprobs) == ("tiny", 9, ["END"], None)
    assert request.logit_bias == {5: 100.0, 6: -0.5}
    assert request.prompt_param == "messages"


async def test_defaults_are_openais() -> None:
    s = stand()
    nulls = dict.fromkeys(("model", "temperature", "top_p", "n", "stop", "seed", "max_tokens", "logit_bias", "top_k"))
    async with s.client() as client:
        await client.post(URL, json={**CHAT, **nulls})
        await client.post(URL, json={**CHAT, "top_k": -1})
    for _, request in s.pipeline.requests:
        assert (request.model, request.temperature, request.top_p, request.top_k) == (None, 1.0, 1.0, 0)
        assert (request.n, request.max_tokens, request.seed, request.stop) == (1, None, None, [])
        assert request.skip_special_tokens
        assert request.add_special_tokens


async def test_messages_as_templates_expect_them() -> None:
    s = stand()
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        {"role": "assistant", "content": "ok", "reasoning": "hm"},
        {"role": "assistant", "content": None, "reasoning_content": "cut"},
    ]
    async with s.client() as client:
        response = await client.post(URL, json={"messages": messages, "tools": [], "tool_choice": "none"})
    assert response.status_code == 200
    assert s.pipeline.requests[0][1].prompts[0].messages == [  # type: ignore[union-attr]  # it is a ChatPrompt
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{"}},
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "reasoning_content": "cut"},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_error_before_the_first_event_is_plain_http(stream: bool) -> None:
    s = stand(OverloadedError("The queue is full; try again later.", retry_after=1.2))
    async with s.client() as client:
        response = await client.post(URL, json={**CHAT, "stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "error": {
            "message": "The queue is full; try again later.",
            "type": "server_error",
            "param": None,
            "code": "overloaded",
        }
    }
    assert s.sample('inferflux_errors_total{reason="overloaded"}') == 0, "the pipeline counts what it refuses itself"


async def test_error_in_a_stream_is_its_last_event() -> None:
    s = stand(*HELLO[:2], EngineRestartedError("The engine was restarted; send the request again."))
    async with s.client() as client:
        chunks = events(await client.post(URL, json={**CHAT, "stream": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [{"role": "assistant", "content": ""}, {"content": "Hel"}]
    assert chunks[-1] == {
        "error": {
            "message": "The engine was restarted; send the request again.",
            "type": "server_error",
            "param": None,
            "code": "engine_restarted",
        }
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_error_after_some_events(stream: bool) -> None:
    """Whole answers fail with the status; an exception nobody expected shows nothing of itself."""
    s = stand(*HELLO[:2], KeyError("secret prompt"))
    async with s.client() as client:
        response = await client.post(URL, json={**CHAT, "stream": stream}, headers={"x-request-id": "rid"})
    error = events(response)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else 500)
    assert error["error"]["code"] == "internal_error"
    assert "'rid'" in error["error"]["message"]
    assert "secret" not in response.text


@needs_document
async def test_replies_conform_to_openais_document() -> None:
    tokens = [entry("Hi", -0.1, ("Hi", -0.1))]
    s = stand(STARTED, Delta(0, "Hi", tokens), Delta(0, "", None, "length"), Done(USAGE))
    async with s.client() as client:
        body = {**CHAT, "logprobs": True, "top_logprobs": 1}
        conforms((await client.post(URL, json=body)).json(), "CreateChatCompletionResponse")
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        chunks = events(await client.post(URL, json=streamed))
        assert len(chunks) == 5
        for chunk in chunks[:-1]:
            conforms(chunk, "CreateChatCompletionStreamResponse")
        for bad in ({}, {**CHAT, "n": 0}, {**CHAT, "tools": [{}]}):
            conforms((await client.post(URL, json=bad)).json(), "ErrorResponse")
        conforms((await client.get("/nowhere")).json(), "ErrorResponse")
