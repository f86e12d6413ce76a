"""What is wrong with a request: 400, the dotted path of the field, and a code where OpenAI's clients look for one."""

from __future__ import annotations

import json

import pytest

from core.serving.scripted import CHAT, stand

CHAT_ERRORS: list[tuple[dict[str, object], str, str | None]] = [
    ({"messages": None}, "messages", None),
    ({"messages": []}, "messages", None),
    ({"messages": "hi"}, "messages", None),
    ({"messages": [5]}, "messages[0]", None),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", None),
    ({"messages": [{"role": "system\x00", "content": "hi"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, "messages[0].content", None),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
        "messages[0].content[0].type",
        "unsupported_value",
    ),
    ({"model": 5}, "model", None),
    ({"temperature": 2.5}, "temperature", None),
    ({"temperature": -0.1}, "temperature", None),
    ({"temperature": "1"}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 0}, "top_p", None),
    ({"top_p": 1.01}, "top_p", None),
    ({"top_k": -5}, "top_k", None),
    ({"top_k": 1.5}, "top_k", None),
    ({"min_p": 1.5}, "min_p", None),
    ({"repetition_penalty": 0}, "repetition_penalty", None),
    ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repeat_penalty", None),
    ({"frequency_penalty": 2.5}, "frequency_penalty", None),
    ({"presence_penalty": -3}, "presence_penalty", None),
    ({"n": 0}, "n", None),
    ({"n": 9}, "n", None),
    ({"n": 10**6}, "n", None),
    ({"n": True}, "n", None),
    ({"seed": 2**63}, "seed", None),
    ({"seed": 2**70}, "seed", None),
    ({"seed": 1.0}, "seed", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": -1}, "max_tokens", None),
    ({"max_tokens": 2**31}, "max_tokens", None),
    ({"max_completion_tokens": "5"}, "max_completion_tokens", None),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", None),
    ({"max_tokens": 9, "max_completion_tokens": 4, "min_tokens": 5}, "min_tokens", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["a", ""]}, "stop[1]", None),
    ({"stop": ["a"] * 17}, "stop", None),
    ({"stop": "x" * 257}, "stop", None),
    ({"stop": 5}, "stop", None),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", None),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", None),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1", None),
    ({"logit_bias": {"1": True}}, "logit_bias.1", None),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", None),
    ({"logprobs": 3}, "logprobs", None),
    ({"top_logprobs": 3}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs", None),
    ({"stream": "yes"}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", None),
    ({"cache_salt": "x" * 257}, "cache_salt", None),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", None),
    ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs.x", None),
    ({"chat_template_kwargs": {"x": "y" * 5000}}, "chat_template_kwargs.x", None),
    ({"chat_template_kwargs": {str(n): 1 for n in range(65)}}, "chat_template_kwargs", None),
    ({"reasoning_effort": "lots"}, "reasoning_effort", None),
    ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning.effort", None),
    ({"reasoning": {"effort": 1}}, "reasoning.effort", None),
    ({"thinking_budget_tokens": -2}, "thinking_budget_tokens", None),
    ({"thinking_budget_tokens": 5, "thinking_token_budget": 6}, "thinking_token_budget", None),
    ({"include_reasoning": "yes"}, "include_reasoning", None),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens", None),
    ({"num_speculative_tokens": 257}, "num_speculative_tokens", None),
    ({"speculative.n_max": True}, "speculative.n_max", None),
    ({"num_speculative_tokens": 1, "speculative.n_max": 2}, "speculative.n_max", None),
    ({"add_generation_prompt": False}, "add_generation_prompt", "unsupported_parameter"),
]

COMPLETION_ERRORS: list[tuple[dict[str, object], str, str | None]] = [
    ({}, "prompt", None),
    ({"prompt": None}, "prompt", None),
    ({"prompt": 5}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt[0]", None),
    ({"prompt": [1, "a"]}, "prompt[1]", None),
    ({"prompt": ["a", 1]}, "prompt[1]", None),
    ({"prompt": [[1], ["a"]]}, "prompt[1][0]", None),
    ({"prompt": [True]}, "prompt[0]", None),
    ({"prompt": [-1]}, "prompt[0]", None),
    ({"prompt": [2**31]}, "prompt[0]", None),
    ({"prompt": ["x"] * 257}, "prompt", None),
    ({"prompt": "x", "max_tokens": 0, "echo": True}, "max_tokens", None),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens", None),
    ({"prompt": "x", "logprobs": 21}, "logprobs", None),
    ({"prompt": "x", "logprobs": True}, "logprobs", None),
    ({"prompt": "x", "echo": True, "logprobs": 0}, "logprobs", "unsupported_parameter"),
    ({"prompt": "x", "best_of": 3}, "best_of", "unsupported_parameter"),
    ({"prompt": "x", "best_of": 1, "n": 2}, "best_of", None),
    ({"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
    ({"prompt": "x", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "unsupported_parameter"),
]


def _name(value: object) -> str:
    return json.dumps(value)[:60]


@pytest.mark.parametrize(
    ("url", "body", "param", "code"),
    [
        *(("/v1/chat/completions", {**CHAT, **body}, param, code) for body, param, code in CHAT_ERRORS),
        *(("/v1/completions", body, param, code) for body, param, code in COMPLETION_ERRORS),
    ],
    ids=_name,
)
async def test_invalid_field(url: str, body: dict[str, object], param: str, code: str | None) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(url, json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert f"'{param}" in error["message"] or f"'{param.partition('.')[0]}" in error["message"]
    assert s.pipeline.requests == []
    reason = code or "invalid_request_error"
    assert s.sample(f'inferflux_errors_total{{reason="{reason}"}}') == 1
    assert s.sample(f'inferflux_requests_total{{endpoint="{url}",finish_reason="",status="400"}}') == 1


async def test_messages_are_for_people() -> None:
    bodies: list[tuple[dict[str, object], str]] = [
        ({"temperature": 3}, "Invalid value for 'temperature': it should be less than or equal to 2, not 3."),
        ({"temperature": "hot"}, "Invalid value for 'temperature': it should be a valid number (received a string)."),
        ({"n": True}, "Invalid value for 'n': it should be a valid integer, not true."),
        ({"n": 9}, "Invalid value for 'n': at most 8 choices are allowed by this server (server.max_choices)."),
        ({"stop": ["a"] * 17}, "Invalid value for 'stop': it should have at most 16 items, not 17."),
        ({"messages": []}, "Invalid value for 'messages': it should have at least 1 item, not 0."),
        ({"messages": None}, "Invalid value for 'messages': it should be an array, not null."),
    ]
    s = stand()
    async with s.client() as client:
        for body, message in bodies:
            response = await client.post("/v1/chat/completions", json={**CHAT, **body})
            assert response.json()["error"]["message"] == message
        missing = await client.post("/v1/chat/completions", json={})
    assert missing.json()["error"]["message"] == "Missing required parameter: 'messages'."


async def test_fields_without_effect_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """OpenAI's own are ignored silently; fields nobody knows leave one line in the log, with harmless names only."""
    known = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "speculative.n_max": 3,
        "tools": None,
    }
    unknown = {"frobnicate": 1, "evil\nname": 2, "dry_multiplier": None}
    s = stand()
    async with s.client() as client:
        for _ in range(2):
            response = await client.post("/v1/chat/completions", json={**CHAT, **known, **unknown})
            assert response.status_code == 200
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "request field 'frobnicate' is not known and ignored; this is said once",
        "request field 'dry_multiplier' is not known and ignored; this is said once",
    ]


@pytest.mark.parametrize("count", [1, 8])
async def test_most_choices(count: int) -> None:
    s = stand(max_choices=count)
    async with s.client() as client:
        assert (await client.post("/v1/chat/completions", json={**CHAT, "n": count})).status_code == 200
        assert (await client.post("/v1/chat/completions", json={**CHAT, "n": count + 1})).status_code == 400
