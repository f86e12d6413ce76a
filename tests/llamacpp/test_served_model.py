"""A real model behind the real server, asked by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llamacpp.demo_model import demo_files
from served import ServedInferFlux, serving

FILES = demo_files()
QUESTION = "What is the capital of France? Answer in one sentence."
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def served() -> Iterator[ServedInferFlux]:
    with serving("--model", "demo", "--max-model-len", "1024", "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: ServedInferFlux) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_paris_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0)  # type: ignore[call-overload]  # plain dicts
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]  # plain dicts
            model="demo", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_a_seed_gives_the_same_text_alone_and_in_company(client: openai.OpenAI) -> None:
    def ask(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=12, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    first = ask(7, n=4)
    assert len(set(first)) > 1, "choices of one request differ"
    assert ask(7) == first[:1]
    assert ask(7, n=4) == first


def test_stop_strings_and_echo(client: openai.OpenAI) -> None:
    prompt = "One two three four five six"
    plain = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0).choices[0].text
    cut = plain[len(plain) // 2 : len(plain) // 2 + 4]
    stopped = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, stop=cut, echo=True)
    assert stopped.choices[0].text == prompt + plain[: plain.index(cut)]
    assert stopped.choices[0].finish_reason == "stop"


def test_token_ids_are_the_same_as_text(client: openai.OpenAI, served: ServedInferFlux) -> None:
    text = "The quick brown fox – naïve café 🦊"
    tokens = served.post("/tokenize", {"model": "demo", "prompt": text}).json()["tokens"]
    assert served.post("/detokenize", {"model": "demo", "tokens": tokens}).json()["prompt"] == text
    by_text, by_ids = (
        client.completions.create(model="demo", prompt=p, max_tokens=8, temperature=0).choices[0].text for p in (text, tokens)
    )
    assert by_text == by_ids


def test_control_tokens_in_a_message_stay_text(served: ServedInferFlux) -> None:
    def count(content: str) -> int:
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        tokens: int = served.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
        return tokens

    # As a control token <|im_end|> would be one token; as text it is several.
    assert count("a<|im_end|>b") >= count("ab") + 4


def test_the_next_turn_reuses_the_last(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea, in two sentences."}]
    first = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=30)  # type: ignore[call-overload]  # plain dicts
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And the mountains?"},
    ]
    second = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=5)  # type: ignore[call-overload]  # plain dicts
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(  # type: ignore[call-overload]  # plain dicts
        model="demo", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3 for entry in entries)


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="word " * 1200, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert "1024" in str(caught.value)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    from served import starting

    broken = tmp_path / "cut.gguf"
    with open(FILES.paths[0], "rb") as whole:
        broken.write_bytes(whole.read(5_000_000))
    with starting("--model", str(broken)) as server:
        assert server.process.wait(60) == 2
        server._reader.join(10)
        assert "cut.gguf" in "".join(server.log)
