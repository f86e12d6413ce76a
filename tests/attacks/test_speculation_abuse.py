"""Attacks on guessing: nothing that a client sees depends on it, and an administrator's wrong pair of models is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from attacks.api_server import ApiServer, api_server, error_of, refusal
from llamacpp.demo_model import demo_files
from served import starting, until

GUESSES = (0, 1, 32, 256)
# What was said is said again and again, so that there is something to copy.
MESSAGES = [{"role": "user", "content": "the same, the same, the same again; " * 3}]
LETTERS = {str(ord(letter)): 12 for letter in "the sam"}


CACHES: dict[str, dict[str, Any]] = {
    "blocks, one ahead": {"num_blocks": 60, "depth": 2},  # three sequences of this file's longest
    "streams": {"layout": "sequence", "pool_tokens": 900},
}


@pytest.fixture(scope="module", params=CACHES)
def running(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("speculation")
    engine = {"speculative": {"method": "ngram", "num_speculative_tokens": 64}}
    with api_server(folder, fake={"max_model_len": 512, **CACHES[request.param]}, engine=engine) as there:
        yield there
        assert "Traceback" not in "".join(there.served.log)


@pytest.fixture
def server(running: ApiServer) -> Iterator[ApiServer]:
    """The server, which afterwards is well and holds nothing."""
    yield running
    running.assert_well()
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    until(lambda: [running.metrics()[f'inferflux_{name}{{model="open"}}'] for name in names] == [0, 0, 0])


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8, "top_p": 0.95, "logit_bias": LETTERS},
    "repeating": {"temperature": 0.5, "logit_bias": {str(ord("t")): 40}, "ignore_eos": True},
    "punished": {"temperature": 1, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "stopped by text": {"temperature": 0.8, "logit_bias": LETTERS, "stop": ["th", "es", "a "]},
    "stopped by a token": {"temperature": 0.8, "logit_bias": LETTERS, "stop_token_ids": [ord("m")]},
    "several": {"temperature": 1, "n": 3, "logit_bias": LETTERS},
    "held": {"temperature": 1, "guided_regex": "(the same, ){5}(and|or) [a-z]{10}"},
    "held and stopped": {"temperature": 1, "guided_regex": "(the same, ){5}(and|or) [a-z]{10}", "stop": ["me, t"]},
    "held to what was said": {"temperature": 1, "guided_json": {"enum": ["the same, the same", "the same again"]}},
}


@pytest.mark.parametrize("name", ASKED)
def test_answer_logprobs_and_price_are_the_same_with_any_number_of_guesses(server: ApiServer, name: str) -> None:
    replies = []
    for number in GUESSES:
        fields = {"messages": MESSAGES, "max_tokens": 120, "seed": 5, "logprobs": True, "top_logprobs": 2, **ASKED[name]}
        reply = server.chat(**fields, num_speculative_tokens=number)
        assert reply.status_code == 200, reply.text
        replies.append(reply.json())
    plain = replies[0]
    for reply in replies[1:]:
        assert reply["choices"] == plain["choices"]
        assert reply["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_a_crowd_in_a_small_cache_gets_what_each_gets_alone(server: ApiServer) -> None:
    def one(number: int) -> str:
        fields: dict[str, Any] = {
            "messages": MESSAGES,
            "logit_bias": LETTERS,
            "temperature": 0.9,
            "seed": number,
            "max_tokens": 150,
        }
        held = {"guided_regex": "(the|same|, | again)*"} if number % 2 else {}
        reply = server.chat(**fields, **held, num_speculative_tokens=GUESSES[number % 4], ignore_eos=True)
        assert reply.status_code == 200, reply.text
        text: str = reply.json()["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(12) as clients:
        crowded = list(clients.map(one, range(16)))
    assert [one(number) for number in range(6)] == crowded[:6]


@pytest.mark.parametrize("number", [-1, 257, 10**30, 1.5, "8", True, [1]])
def test_numbers_of_guesses_that_make_no_sense_are_refused(server: ApiServer, number: object) -> None:
    for url, asked in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "hi"})):
        reply = server.ask("POST", url, {"model": "open", **asked, "num_speculative_tokens": number})
        assert refusal(reply)[0] == 400
        assert "num_speculative_tokens" in error_of(reply)["message"]


def test_clients_that_leave_in_the_middle_of_guesses_leave_nothing_behind(server: ApiServer) -> None:
    body = {"model": "open", "messages": MESSAGES, "stream": True, "max_tokens": 300, "ignore_eos": True, "logit_bias": LETTERS}
    headers = {"authorization": f"Bearer {server.user}"}
    for number in range(6):
        fields = {**body, "num_speculative_tokens": 64, "seed": number}
        with server.client.stream("POST", "/v1/chat/completions", json=fields, headers=headers) as reply:
            lines = reply.iter_lines()
            for _ in range(number):
                next(lines)


def test_guesses_were_made_and_some_held(server: ApiServer) -> None:
    """So that the tests of this file are about something."""
    text = server.chat(messages=MESSAGES, max_tokens=200, logit_bias={str(ord("t")): 100}, ignore_eos=True, temperature=0)
    assert text.json()["choices"][0]["message"]["content"] == "t" * 200
    found = server.metrics()
    assert found['inferflux_spec_accepted_tokens_total{model="open"}'] > 0


def test_a_draft_model_with_another_vocabulary_is_refused_with_the_reason(tmp_path: Path) -> None:
    demo_files()
    other = {"method": "draft_model", "model": "demo"}
    settings = {"state_dir": str(tmp_path), "models": [{"source": "fake", "name": "a", "speculative": other}]}
    (tmp_path / "inferflux.json").write_text(json.dumps(settings))
    with starting("--config", str(tmp_path / "inferflux.json"), cwd=tmp_path) as served:
        assert served.process.wait(60) == 2
        served._reader.join(30)
    assert (
        "Error: model 'a': draft model 'demo' cannot draft for 'fake': 260 of their first 260 tokens differ" in served.log[-1]
    )
    assert "name a draft model of the same family" in served.log[-1]
