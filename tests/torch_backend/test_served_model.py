"""Both backends serve the same weights from one server, asked by the official client; and what is refused at start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llamacpp.demo_model import demo_files
from served import ServedInferFlux, serving, starting
from torch_backend.twin import demo_twin

demo_files()
TWIN = demo_twin()
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
SMALL = ("--max-model-len", "1024", "--max-num-seqs", "8", "--set", "backends.torch.kv_cache_mib=256")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedInferFlux]:
    config = tmp_path_factory.mktemp("config") / "inferflux.yaml"
    config.write_text(
        json.dumps({"models": [{"source": "demo", "name": "gguf"}, {"source": str(TWIN), "name": "safetensors"}]})
    )
    with serving("--config", str(config), *SMALL) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: ServedInferFlux) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, **options)  # type: ignore[call-overload]  # plain dicts


def test_both_backends_say_paris(client: openai.OpenAI) -> None:
    for model in ("gguf", "safetensors"):
        assert "Paris" in chat(client, model).choices[0].message.content


def test_both_make_the_same_prompt(served: ServedInferFlux) -> None:
    text = "The quick brown fox – naïve café 🦊 <|im_start|>user"
    first, second = (served.post("/tokenize", {"model": m, "prompt": text}).json()["tokens"] for m in ("gguf", "safetensors"))
    assert first == second
    prompts = [chat_prompt_tokens(served, model) for model in ("gguf", "safetensors")]
    assert prompts[0] == prompts[1]


def chat_prompt_tokens(served: ServedInferFlux, model: str) -> int:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 1}
    tokens: int = served.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    return tokens


def test_a_stream_is_the_whole_answer_and_the_prefix_is_found_again(client: openai.OpenAI) -> None:
    whole = chat(client, "safetensors")
    chunks = list(chat(client, "safetensors", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_long_prompt_is_cached_by_blocks(client: openai.OpenAI) -> None:
    prompt = "One two three four five six seven eight nine ten. " * 20
    for expected in (0, 192):
        usage = client.completions.create(model="safetensors", prompt=prompt, max_tokens=1, temperature=0).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == expected
        assert 192 < usage.prompt_tokens <= 256, "three blocks of 64 and a part"


def test_seeds_and_logprobs(client: openai.OpenAI) -> None:
    def ask(n: int) -> list[str]:
        answer = client.completions.create(model="safetensors", prompt="Once upon a time", max_tokens=8, seed=7, n=n)
        return [choice.text for choice in answer.choices]

    first = ask(3)
    assert len(set(first)) > 1
    assert ask(1) == first[:1]
    entry = chat(client, "safetensors", logprobs=True, top_logprobs=3, max_tokens=2).choices[0].logprobs.content[0]
    assert entry.top_logprobs[0].token == entry.token
    assert len(entry.top_logprobs) == 3


def test_the_model_card_says_what_serves_it(served: ServedInferFlux) -> None:
    cards = {card["id"]: card["inferflux"] for card in served.get("/v1/models")[1]["data"]}
    assert cards["gguf"]["backend"] == "llamacpp"
    assert cards["safetensors"]["backend"] == "torch"
    details = cards["safetensors"]["details"]
    assert details["path"] == "inferflux decoder"
    assert (details["architecture"], details["dtype"], details["parameters"]) == ("LlamaForCausalLM", "bfloat16", "134515008")


# --- refused at start -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The twin's files but its weights, which are linked."""
    for file in TWIN.iterdir():
        if file.name == "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            shutil.copy(file, tmp_path)
    return tmp_path


def refusal(folder: Path, *options: str) -> str:
    with starting("--model", str(folder), *SMALL, *options) as server:
        assert server.process.wait(60) != 0
        server._reader.join(30)
        log = "".join(server.log)
        assert "Traceback" not in log
        return log


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_remote_code(copy: Path) -> None:
    change_config(copy, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    assert "auto_map" in refusal(copy)


def test_shapes_that_contradict_the_configuration(copy: Path) -> None:
    change_config(copy, intermediate_size=1600)
    assert "contradict config.json in their shapes" in refusal(copy)


def test_missing_and_unexpected_tensors(copy: Path) -> None:
    change_config(copy, num_hidden_layers=31)
    assert "'model.layers.30." in refusal(copy)
    change_config(copy, num_hidden_layers=29)
    assert "unexpected" in refusal(copy)


def test_a_model_that_does_not_fit_into_memory(copy: Path) -> None:
    log = refusal(copy, "--set", "backends.torch.kv_cache_mib=99000000")
    assert "GiB of memory" in log


def test_a_sequence_that_does_not_fit_into_the_cache(copy: Path) -> None:
    assert "raise `kv_cache_mib`" in refusal(copy, "--set", "backends.torch.kv_cache_mib=2")


def test_a_device_that_is_not_there(copy: Path) -> None:
    assert "device 'mps' is not there" in refusal(copy, "--set", "backends.torch.device=mps")


def test_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "can run code when loaded" in refusal(tmp_path)
