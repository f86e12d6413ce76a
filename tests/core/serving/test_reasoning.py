"""Thoughts on the wire: what requests may say of them, and under which names replies carry them."""

from __future__ import annotations

from typing import Any

import pytest

from core.serving.conformance import conforms, needs_document
from core.serving.scripted import CHAT, STARTED, USAGE, entry, stand
from core.serving.test_chat import URL, events
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.serving.generation import ChatPrompt, Delta, Done

THOUGHT = (STARTED, Delta(0, "", reasoning="Hm"), Delta(0, "Yes", None, "stop", "."), Done(USAGE))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, ReasoningOptions()),
        ({"reasoning_effort": "none"}, ReasoningOptions(effort="none")),
        ({"reasoning_effort": "xhigh"}, ReasoningOptions(effort="xhigh")),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, ReasoningOptions(effort="low")),
        ({"reasoning_effort": "low", "reasoning": {"effort": "low"}}, ReasoningOptions(effort="low")),
        ({"thinking_budget_tokens": 0}, ReasoningOptions(budget=0)),
        ({"thinking_token_budget": 5}, ReasoningOptions(budget=5)),
        ({"thinking_budget_tokens": -1}, ReasoningOptions()),
        ({"reasoning": {"max_tokens": 7, "exclude": True}}, ReasoningOptions(budget=7, include=False)),
        ({"include_reasoning": False}, ReasoningOptions(include=False)),
        ({"reasoning": {"enabled": False}}, ReasoningOptions(effort="none")),
        ({"reasoning": {"enabled": True, "effort": "low"}}, ReasoningOptions(effort="low")),
        ({"reasoning_format": "none"}, ReasoningOptions(apart=False)),
        ({"reasoning_format": "raw"}, ReasoningOptions(apart=False)),
        ({"reasoning_format": "auto"}, ReasoningOptions()),
        ({"reasoning_format": "deepseek"}, ReasoningOptions()),
        ({"reasoning_format": "parsed"}, ReasoningOptions()),
        ({"reasoning_format": "hidden"}, ReasoningOptions(include=False)),
    ],
)
async def test_options(fields: dict[str, Any], options: ReasoningOptions) -> None:
    s = stand()
    async with s.client() as client:
        assert (await client.post(URL, json={**CHAT, **fields})).status_code == 200
    assert s.pipeline.requests[0][1].reasoning == options


async def test_template_variables_reach_the_pipeline() -> None:
    s = stand()
    kwargs = {"enable_thinking": False, "level": 2, "mood": "calm", "ratio": 0.5, "nothing": None}
    async with s.client() as client:
        assert (await client.post(URL, json={**CHAT, "chat_template_kwargs": kwargs})).status_code == 200
    prompt = s.pipeline.requests[0][1].prompts[0]
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs == kwargs


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("both", ("reasoning_content", "reasoning")),
        ("reasoning_content", ("reasoning_content",)),
        ("reasoning", ("reasoning",)),
        ("none", ()),
    ],
)
async def test_names_of_thoughts(field: str, names: tuple[str, ...]) -> None:
    s = stand(*THOUGHT, reasoning_field=field)
    async with s.client() as client:
        whole = (await client.post(URL, json=CHAT)).json()
        chunks = events(await client.post(URL, json={**CHAT, "stream": True}))
    assert whole["choices"][0]["message"] == {
        "content": "Yes",
        "role": "assistant",
        "refusal": None,
        **dict.fromkeys(names, "Hm."),
    }
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    thoughts = [dict.fromkeys(names, text) for text in ("Hm", ".")] if names else []
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [*thoughts, {"content": "Yes"}, {}]


async def test_an_answer_without_thoughts_has_no_field_for_them() -> None:
    s = stand(STARTED, Delta(0, "Yes", finish_reason="stop"), Done(USAGE))
    async with s.client() as client:
        message = (await client.post(URL, json=CHAT)).json()["choices"][0]["message"]
    assert message.keys() == {"content", "role", "refusal"}


async def test_log_probabilities_of_hidden_thoughts_are_told_all_the_same() -> None:
    s = stand(
        STARTED,
        Delta(0, "", [entry("Hm", -1.0)], reasoning="Hm"),
        Delta(0, "", None, "stop"),
        Done(USAGE),
        reasoning_field="none",
    )
    async with s.client() as client:
        chunks = events(await client.post(URL, json={**CHAT, "stream": True, "logprobs": True}))
    choices = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert choices[0]["delta"] == {"content": ""}
    assert [c["logprobs"] and c["logprobs"]["content"][0]["logprob"] for c in choices] == [-1.0, None]


@needs_document
async def test_replies_conform_to_openais_document() -> None:
    s = stand(*THOUGHT)
    async with s.client() as client:
        conforms((await client.post(URL, json=CHAT)).json(), "CreateChatCompletionResponse")
        for chunk in events(await client.post(URL, json={**CHAT, "stream": True}))[:-1]:
            conforms(chunk, "CreateChatCompletionStreamResponse")
