"""`inferflux bench`: what it sends, what it measures, and how it reports servers of every kind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.cli.stub_server import Exchange, Handler, StubServer, answering, sse, text_chunk, usage_chunk
from inferflux_core.cli.bench.command import bench
from inferflux_core.cli.bench.workloads import Workload

COMPLETIONS = "/v1/completions"
QUICK = ("-c", "2", "--requests", "4", "--max-tokens", "3", "--alternations", "2", "--warmup", "0")


def run_bench(*arguments: str) -> Result:
    return CliRunner().invoke(bench, list(arguments))


def report(*arguments: str) -> dict[str, Any]:
    result = run_bench(*arguments, "--json")
    assert result.stderr == ""
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if document["failed"] else 0)
    return document


def prompts(server: StubServer) -> list[str]:
    return [request.json["prompt"] for request in server.posts()]


THREE = answering("a", "b", "c", prompt=7, cached=2, chat=False)


# what is sent and reported


def test_one_server() -> None:
    with StubServer({COMPLETIONS: THREE}) as server:
        document = report("--url", server.url, *QUICK)
    sent = server.posts()
    assert len(sent) == 8
    assert len(set(prompts(server))) == 8
    assert {key: value for key, value in sent[0].json.items() if key != "prompt"} == {
        "model": "demo",
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert document["format"] == "inferflux-bench/1"
    assert document["parameters"] == {
        "workload": "plain",
        "description": "distinct prompts of about 110 tokens, 3 tokens out",
        "concurrency": 2,
        "rate": None,
        "requests": 4,
        "max_tokens": 3,
        "prompt_tokens": 110,
        "alternations": 2,
        "warmup": 0,
        "seed": 0,
        "timeout_s": 300.0,
    }
    [found] = document["servers"]
    assert (found["name"], found["model"], found["reference"]) == (f"127.0.0.1:{server.port}", "demo", False)
    assert (found["ratios"], found["agreement"], found["version"], found["body"]) == (None, None, None, {})
    assert len(found["alternations"]) == 2
    for figures in found["alternations"]:
        counts = ("requests", "failed", "output_tokens", "prompt_tokens", "cached_tokens", "chunks", "short_answers")
        assert [figures[name] for name in counts] == [4, 0, 12, 28, 8, 12, 0]
        assert figures["errors"] == {}
        assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p99_ms"] <= figures["latency_p99_ms"]
        assert figures["output_tokens_per_s"] == pytest.approx(12 / figures["wall_s"])
        assert figures["late_send_p99_ms"] is None
    assert found["medians"]["output_tokens"] == 12


def test_servers_take_turns_and_get_the_same_prompts() -> None:
    order: list[str] = []

    def named(name: str, last: str) -> Handler:
        async def handler(exchange: Exchange) -> None:
            order.append(name)
            await answering("same", last, chat=False)(exchange)

        return handler

    async def version(exchange: Exchange) -> None:
        await exchange.reply(200, {"version": "9.9"})

    with (
        StubServer({COMPLETIONS: named("A", " end"), "/version": version}) as ours,
        StubServer({COMPLETIONS: named("B", " eNd")}) as theirs,
    ):
        names = ("--url", ours.url, "--name", "ours", "--url", theirs.url, "--name", "theirs")
        document = report(*names, "-c", "1", "--requests", "2", "--alternations", "2", "--warmup", "1", "--max-tokens", "2")
        table = run_bench(*names, "--requests", "2", "--alternations", "1", "--warmup", "0", "--max-tokens", "2")
    assert "".join(order[:10]) == "AB" + "AABB" * 2  # warm-up, then two alternations of two requests
    assert prompts(ours)[:5] == prompts(theirs)[:5]
    assert len(set(prompts(ours)[:5])) == 5
    first, last = document["servers"]
    assert (first["reference"], last["reference"], last["ratios"]) == (False, True, None)
    assert (first["version"], last["version"]) == ("9.9", None)
    assert first["ratios"]["output_tokens"] == 1.0
    assert first["ratios"]["ttft_p50_ms"] > 0
    assert first["agreement"] == {
        "name": "ours",
        "reference": "theirs",
        "compared": 4,
        "identical": 0,
        "identical_ratio": 0.0,
        "first_difference": {
            "alternation": 0,
            "request": 0,
            "turn": 0,
            "common_prefix": 6,
            "length": 8,
            "reference_length": 8,
        },
    }
    assert table.exit_code == 0
    assert "ours / theirs" in table.stdout
    assert (
        "ours: 0 of 2 outputs are identical to theirs's; the first that differs: alternation 0, request 0, "
        "after 6 equal characters of 8 and 8\n"
    ) in table.stdout
    assert "prompt:" not in table.stdout


def test_prompts_are_shown_only_when_asked_for() -> None:
    with (
        StubServer({COMPLETIONS: answering("yes", chat=False)}) as ours,
        StubServer({COMPLETIONS: answering("yeah", chat=False)}) as theirs,
    ):
        arguments = ("--url", ours.url, "--url", theirs.url, "--requests", "1", "--alternations", "1", "--warmup", "0")
        plain, shown = run_bench(*arguments), run_bench(*arguments, "--show-diff")
    prompt = prompts(ours)[0]
    assert prompt not in plain.stdout
    assert shown.stdout.endswith(
        f"prompt: {prompt!r}\n"
        f"127.0.0.1:{ours.port}, characters 0 to 3: 'yes'\n"
        f"127.0.0.1:{theirs.port}, characters 0 to 4: 'yeah'\n"
    )


def test_turns_carry_the_conversation_with_the_servers_answers() -> None:
    async def numbered(exchange: Exchange) -> None:
        await answering(f" answer {len(server.posts())}.", chat=False)(exchange)

    with StubServer({COMPLETIONS: numbered}) as server:
        document = report(
            "--url", server.url, "--workload", "turns", "-c", "1", "--requests", "3", "--alternations", "1", "--warmup", "0"
        )
    assert document["parameters"]["requests"] == 4  # whole conversations
    messages = Workload.make("turns").scripts(4, seed=0, alternation=0)[0].messages
    expected = [f"User: {messages[0]}\nAssistant:"]
    for number, message in enumerate(messages[1:], 1):
        expected.append(f"{expected[-1]} answer {number}.\nUser: {message}\nAssistant:")
    assert prompts(server) == expected


def test_a_rate_is_an_open_loop() -> None:
    held: list[Exchange] = []

    async def all_at_once(exchange: Exchange) -> None:
        """Answers nobody until all four have been asked: an open loop does not wait, a closed one would hang."""
        held.append(exchange)
        if len(held) < 4:
            return
        for each in held:
            await THREE(each)

    with StubServer({COMPLETIONS: all_at_once}) as server:
        document = report(
            *("--url", server.url, "--rate", "500", "--requests", "4", "--max-tokens", "3"),
            *("--alternations", "1", "--warmup", "0", "--timeout", "10"),
        )
    [figures] = document["servers"][0]["alternations"]
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (4, 0, 12)
    assert figures["late_send_p99_ms"] > 0
    assert document["parameters"]["concurrency"] is None


async def _llama_server(exchange: Exchange) -> None:
    last = text_chunk("", "length") | {"timings": {"prompt_n": 1}, "usage": usage_chunk(5, 2, 4)["usage"]}
    await exchange.begin()
    await exchange.event(text_chunk("a") | {"system_fingerprint": "b1"})
    await exchange.event(text_chunk("b"))
    await exchange.event(last)
    await exchange.end()


async def _vllm(exchange: Exchange) -> None:
    await exchange.begin()
    for text in ("", "a", "b"):
        chunk = text_chunk(text) | {"usage": None}
        chunk["choices"][0] |= {"logprobs": None, "stop_reason": None, "token_ids": None}
        await exchange.event(chunk)
    await exchange.event(text_chunk("", "length"))
    await exchange.event(usage_chunk(5, 2) | {"usage": usage_chunk(5, 2)["usage"] | {"prompt_tokens_details": None}})
    await exchange.end()


async def _without_usage(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.chunk(sse(text_chunk("a")) + sse(text_chunk("b", "length")))
    await exchange.end()


async def _until_close(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    await exchange.send(sse(text_chunk("a")) + sse(text_chunk("b")) + sse(usage_chunk(5, 2)) + b"data: [DONE]\n\n")
    exchange.hang_up()


@pytest.mark.parametrize(
    ("handler", "prompt_tokens", "cached_tokens", "estimated"),
    [(_llama_server, 5, 4, 0), (_vllm, 5, None, 0), (_without_usage, None, None, 1), (_until_close, 5, None, 0)],
)
def test_every_servers_stream(handler: Handler, prompt_tokens: int | None, cached_tokens: int | None, estimated: int) -> None:
    with StubServer({COMPLETIONS: handler}) as server:
        document = report("--url", server.url, "--requests", "1", "--alternations", "1", "--warmup", "0", "--max-tokens", "2")
    [figures] = document["servers"][0]["alternations"]
    assert (figures["failed"], figures["output_tokens"], figures["short_answers"]) == (0, 2, 0)
    assert (figures["prompt_tokens"], figures["cached_tokens"]) == (prompt_tokens, cached_tokens)
    assert figures["estimated_answers"] == estimated


def test_connections_are_kept_and_a_stale_one_is_replaced() -> None:
    with StubServer({COMPLETIONS: THREE}) as server:
        report("--url", server.url, "-c", "1", *QUICK[2:])
        ports = [exchange.writer.get_extra_info("peername")[1] for exchange in server.posts()]
        assert [len(set(ports[:4])), len(set(ports[4:]))] == [1, 1]
        server.close_each = True  # the client may learn it only when it sends the next request
        document = report("--url", server.url, "-c", "1", *QUICK[2:])
    assert document["failed"] == 0


# failures


async def _error_in_stream(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(text_chunk("a"))
    await exchange.event({"error": {"message": "engine died", "type": "server_error", "param": None, "code": None}})
    await exchange.end(done=False)


async def _cut_off(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(text_chunk("a"))
    exchange.hang_up()


async def _unfinished(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(text_chunk("a"))
    await exchange.end(done=False)


async def _refused(exchange: Exchange) -> None:
    await exchange.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "3"})


async def _no_stream(exchange: Exchange) -> None:
    await exchange.reply(200, text_chunk("a"))


async def _no_text(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.end()


async def _garbage(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.chunk(b"data: {nope\n\n")
    await exchange.end()


async def _not_http(exchange: Exchange) -> None:
    await exchange.send(b"SSH-2.0-OpenSSH\r\n")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_error_in_stream, "engine died"),
        (_cut_off, "the connection closed in the middle of the answer"),
        (_unfinished, "the connection closed in the middle of the answer"),
        (_refused, "slow down. Try again in 3 s (HTTP 429)"),
        (_no_stream, "{url}/v1/completions did not answer with an event stream"),
        (_no_text, "the answer has no text"),
        (_garbage, "the answer cannot be read: JSON is malformed: object keys must be strings (byte 1)"),
        (_not_http, "the answer is not HTTP"),
    ],
)
def test_errors_are_counted_by_message(handler: Handler, message: str) -> None:
    calls = 0

    async def every_other(exchange: Exchange) -> None:
        nonlocal calls
        calls += 1
        await (handler if calls % 2 else THREE)(exchange)

    with StubServer({COMPLETIONS: every_other}) as server:
        document = report("--url", server.url, "-c", "1", "--requests", "4", "--alternations", "1", "--warmup", "0")
    [figures] = document["servers"][0]["alternations"]
    assert figures["errors"] == {message.format(url=server.url): 2}
    assert (document["failed"], figures["output_tokens"]) == (2, 6)


def test_a_failed_turn_ends_its_conversation() -> None:
    with StubServer({COMPLETIONS: _refused}) as server:
        document = report("--url", server.url, "--workload", "turns", "-c", "1", "--alternations", "1", "--warmup", "0")
    [figures] = document["servers"][0]["alternations"]
    assert figures["requests"] == 8
    assert figures["errors"] == {
        "not sent, because an earlier turn had failed": 6,
        "slow down. Try again in 3 s (HTTP 429)": 2,
    }
    assert (figures["output_tokens_per_s"], figures["ttft_p50_ms"]) == (None, None)


def test_a_timeout_is_an_error_and_closes_the_connection() -> None:
    with StubServer({COMPLETIONS: Exchange.wait_for_disconnect}) as server:
        document = report(
            *("--url", server.url, "-c", "1", "--requests", "1", "--alternations", "1", "--warmup", "0", "--timeout", "0.1")
        )
    assert document["servers"][0]["alternations"][0]["errors"] == {"no complete answer within 0.1 s": 1}


def test_a_server_that_fails_its_warm_up_is_not_measured() -> None:
    with StubServer({COMPLETIONS: _refused}) as server:
        result = run_bench("--url", server.url, "--name", "ours", "-c", "2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: ours fails every warm-up request: slow down. Try again in 3 s (HTTP 429)\n"
    assert len(server.posts()) == 2


def test_an_unreachable_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        result = run_bench("--url", url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: cannot reach {url}: connection refused. Is the server running?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "2", "--rate", "3"], "-c and --rate exclude each other"),
        (["--rate", "3", "--workload", "turns"], "--rate does not go with --workload turns"),
        (["--url", "here"], "'here' has no scheme. Write it as http://here"),
        (["--url", "http://a", "--url", "http://b", "--name", "x"], "there are 2 --url and 1 --name"),
        (["--url", "http://a", "--url", "http://a"], "two servers have the same name"),
        (["--url", "http://a", "--model", "x", "--model", "y"], "there are 1 --url and 2 --model"),
        (["--body", "[1]"], "--body is no JSON object, nor @FILE with one: Expected `object`, got `array`"),
        (["--body", "@/nowhere"], "--body is no JSON object, nor @FILE with one: [Errno 2]"),
        (["--body", '{"max_tokens": 3}'], "--body cannot set 'max_tokens': give it with --max-tokens"),
        (["--requests", "0"], "Invalid value for '--requests'"),
        (["--workload", "x"], "Invalid value for '--workload'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str) -> None:
    result = run_bench(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_ctrl_c_ends_it_without_a_report() -> None:
    asked = threading.Event()

    async def silent(exchange: Exchange) -> None:
        asked.set()
        await exchange.wait_for_disconnect()

    # A test run in the background hands its children an ignored SIGINT, which a terminal does not.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from inferflux_core.cli.bench.command import bench; bench()"
    )
    with StubServer({COMPLETIONS: silent}) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "--url", server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert asked.wait(10)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=10)
    assert printed == ("", "stopped: nothing is reported of a benchmark that was not finished\n")
    assert process.returncode == 130
