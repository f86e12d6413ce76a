"""The official client against a real server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import openai
import pytest

from core.serving.scripted import HELLO, STARTED, USAGE, Stand, Step, entry, serving, stand
from inferflux_core.errors import EngineRestartedError, ModelNotFoundError, OverloadedError, RequestTimeoutError
from inferflux_core.serving.generation import Delta, Done


@contextlib.asynccontextmanager
async def connected(*steps: Step) -> AsyncIterator[tuple[openai.AsyncOpenAI, Stand]]:
    s = stand(*steps)
    async with serving(s.app) as port:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        async with client:
            yield client, s


async def test_chat() -> None:
    async with connected() as (client, _):
        answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Say hi"}])
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 8
    assert answer._request_id is not None


async def test_chat_stream() -> None:
    async with connected() as (client, _):
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Say hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "Hel", "lo", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_chat_logprobs() -> None:
    async with connected(STARTED, Delta(0, "Hi", [entry("Hi", -0.1, ("Hi", -0.1))], "stop"), Done(USAGE)) as (client, _):
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1
        )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "Hi"


async def test_completions() -> None:
    async with connected() as (client, _):
        answer = await client.completions.create(model="tiny", prompt="x", echo=True)
        stream = await client.completions.create(model="tiny", prompt=[1, 2], stream=True)
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].text == "Say hiHello"
    assert [(chunk.object, chunk.choices[0].text) for chunk in chunks] == [
        ("text_completion", "Hel"),
        ("text_completion", "lo"),
    ]


async def test_models() -> None:
    async with connected() as (client, _):
        models = [model.id async for model in await client.models.list()]
        model = await client.models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert models == ["tiny"]
    assert (model.object, model.owned_by) == ("model", "inferflux")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (ModelNotFoundError("The model 'x' does not exist.", param="model"), openai.NotFoundError, "model_not_found"),
        (OverloadedError("The queue is full; try again later."), openai.InternalServerError, "overloaded"),
        (RequestTimeoutError("The request took too long."), openai.InternalServerError, "request_timeout"),
        (KeyError("secret"), openai.InternalServerError, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_exceptions(error: Exception, expected: type[openai.APIStatusError], code: str, stream: bool) -> None:
    async with connected(error) as (client, _):
        with pytest.raises(expected) as caught:
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=stream)
    assert caught.value.code == code
    assert caught.value.request_id is not None


async def test_bad_request() -> None:
    async with connected() as (client, s):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], temperature=3)
    assert (caught.value.param, caught.value.code, caught.value.type) == ("temperature", None, "invalid_request_error")
    assert s.pipeline.requests == []


async def test_error_in_a_stream() -> None:
    async with connected(*HELLO[:2], EngineRestartedError("The engine was restarted.")) as (client, _):
        stream = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True)
        texts = []

        async def read() -> None:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError) as caught:
            await read()
    assert texts == ["", "Hel"]
    assert caught.value.message == "The engine was restarted."
    assert caught.value.code == "engine_restarted"


async def test_leaving_a_stream_aborts_it() -> None:
    endless = [Delta(0, "x") for _ in range(100_000)]
    async with connected(STARTED, *endless, Done(USAGE)) as (client, s):
        stream = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True)
        async for _ in stream:
            break
        await stream.close()
        await s.pipeline.closed.wait()
    assert s.pipeline.completed == 0
