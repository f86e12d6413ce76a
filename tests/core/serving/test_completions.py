"""Text completions on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from core.serving.conformance import conforms, needs_document
from core.serving.scripted import STARTED, USAGE, entry, stand
from inferflux_core.serving.generation import Delta, Done, Started

URL = "/v1/completions"


def chunks_of(response: httpx.Response) -> list[Any]:
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def test_whole_answer() -> None:
    s = stand()
    async with s.client() as client:
        body = (await client.post(URL, json={"prompt": "Say hi"})).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "fp_test",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 8},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    }
    assert s.pipeline.requests[0][1].max_tokens == 16
    assert s.pipeline.requests[0][1].prompt_param == "prompt"


async def test_stream_bytes() -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, json={"prompt": "x", "stream": True})
    first = chunks_of(response)[0]
    head = (
        f'data: {{"id":"{first["id"]}","object":"text_completion","created":{first["created"]},"model":"tiny",'
        '"system_fingerprint":"fp_test","choices":[{"index":0,"text":'
    )
    assert response.text == (
        head + '"Hel","logprobs":null,"finish_reason":null}]}\n\n'
        + head + '"lo","logprobs":null,"finish_reason":"stop"}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 0], [[1, 2, 0]]),
        ([0], [[0]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_shapes_of_prompt(prompt: object, expected: list[object]) -> None:
    deltas = [Delta(index, "x", finish_reason="stop") for index in range(len(expected))]
    s = stand(STARTED, *deltas, Done(USAGE))
    async with s.client() as client:
        response = await client.post(URL, json={"prompt": prompt})
    assert response.status_code == 200
    assert s.pipeline.requests[0][1].prompts == expected


async def test_echo_and_choice_order() -> None:
    started = Started("tiny", "fp", ["one ", "two "])
    deltas = [Delta(index, str(index), finish_reason="length") for index in (3, 0, 2, 1)]
    s = stand(started, *deltas, Done(USAGE))
    body = {"prompt": ["one ", "two "], "n": 2, "echo": True}
    async with s.client() as client:
        whole = (await client.post(URL, json=body)).json()
        streamed = chunks_of(await client.post(URL, json={**body, "stream": True}))
    expected = {0: "one 0", 1: "one 1", 2: "two 2", 3: "two 3"}
    assert {choice["index"]: choice["text"] for choice in whole["choices"]} == expected
    texts = dict.fromkeys(expected, "")
    for chunk in streamed:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected


async def test_logprobs_and_offsets() -> None:
    first = [entry("Hi", -0.5, ("Hi", -0.5), ("Yo", -1.0)), entry(" you", -2.0, ("me", -1.0), ("me", -3.0))]
    s = stand(STARTED, Delta(0, "Hi you", first), Delta(0, "!", [entry("!", -0.25)], "length"), Done(USAGE))
    async with s.client() as client:
        whole = (await client.post(URL, json={"prompt": "x", "logprobs": 2})).json()
        streamed = chunks_of(await client.post(URL, json={"prompt": "x", "logprobs": 2, "stream": True}))
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["Hi", " you", "!"],
        "token_logprobs": [-0.5, -2.0, -0.25],
        "top_logprobs": [{"Hi": -0.5, "Yo": -1.0}, {"me": -1.0, " you": -2.0}, {"!": -0.25}],
        "text_offset": [0, 2, 6],
    }
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in streamed] == [[0, 2], [6]]


@needs_document
async def test_replies_conform_to_openais_document() -> None:
    s = stand(STARTED, Delta(0, "Hi", [entry("Hi", -0.1)]), Delta(0, "", None, "length"), Done(USAGE))
    async with s.client() as client:
        body = {"prompt": "x", "logprobs": 1}
        conforms((await client.post(URL, json=body)).json(), "CreateCompletionResponse")
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        chunks = chunks_of(await client.post(URL, json=streamed))
    assert len(chunks) == 3
    assert chunks[-1]["choices"] == []
    # The document has one schema for whole answers and chunks. Only the last chunk of a choice has a finish_reason, and its
    # own text on stream_options asks for the `usage: null` that the schema has no place for.
    assert chunks[1].pop("usage") is None
    conforms(chunks[1], "CreateCompletionResponse")
    conforms(chunks[2], "CreateCompletionResponse")
