"""inferctl from outside: what it prints, what it sends, and its exit codes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.cli.stub_server import (
    Exchange,
    Handler,
    StubServer,
    answering,
    chat_chunk,
    models_document,
    text_chunk,
)
from inferflux_core.cli.inferctl import inferctl

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def run(server: StubServer, *arguments: str, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(inferctl, ["--url", server.url, *arguments], input=stdin)


def lines(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def replying(status: int, document: object, headers: dict[str, str] | None = None) -> Handler:
    async def handler(exchange: Exchange) -> None:
        await exchange.reply(status, document, headers)

    return handler


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# chat


def test_chat_prints_the_answer_and_sends_the_settings() -> None:
    with StubServer({CHAT: answering("Par", "is")}) as server:
        result = run(server, "chat", "Capital of France?", "--system", "Be brief", "--temperature", "0", "--max-tokens", "5")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris\n", "")
    assert server.posts()[0].json == {
        "model": "demo",
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Capital of France?"},
        ],
        "temperature": 0.0,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_chat_takes_the_message_from_stdin_and_the_default_model() -> None:
    models = models_document({"id": "one"}, {"id": "two", "inferflux": {"default": True}})
    with StubServer({CHAT: answering("ok\n"), "/v1/models": replying(200, models)}) as server:
        result = run(server, "chat", stdin="héllo\n")
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert server.posts()[0].json["messages"] == [{"role": "user", "content": "héllo"}]
    assert server.posts()[0].json["model"] == "two"


def test_chat_as_ndjson() -> None:
    with StubServer({CHAT: answering("Par", "is", prompt=9, cached=8)}) as server:
        result = run(server, "chat", "x", "--json", "-m", "demo")
    assert lines(result) == [
        {"type": "text", "text": "Par"},
        {"type": "text", "text": "is"},
        {
            "type": "done",
            "model": "demo",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 8},
        },
    ]
    assert [request.path for request in server.requests] == [CHAT]  # a named model is not looked up


def test_chat_without_streaming_is_one_document() -> None:
    answer = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2},
    }
    with StubServer({CHAT: replying(200, answer)}) as server:
        result = run(server, "chat", "x", "--json", "--no-stream")
    assert lines(result) == [
        {
            "model": "demo",
            "text": "Paris",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": None},
        }
    ]
    assert server.posts()[0].json["stream"] is False


async def _error_after_text(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(chat_chunk("Par"))
    await exchange.event({"error": {"message": "engine died", "type": "server_error", "param": None, "code": "x"}})
    await exchange.end(done=False)


async def _cut_off(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(chat_chunk("Par"))
    exchange.hang_up()


async def _ends_early(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(chat_chunk("Par"))
    await exchange.end(done=False)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_error_after_text, "engine died"),
        (_ends_early, "the connection to {url} closed in the middle of the answer"),
        (
            _cut_off,
            "the connection to {url} broke: peer closed connection without sending complete message body "
            "(incomplete chunked read)",
        ),
    ],
)
def test_a_stream_that_fails_keeps_its_text_and_says_why(handler: Handler, message: str) -> None:
    with StubServer({CHAT: handler}) as server:
        result = run(server, "chat", "x")
        as_json = run(server, "chat", "x", "--json")
    wanted = message.format(url=server.url)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Par\n", f"Error: {wanted}\n")
    assert as_json.exit_code == 1
    assert lines(as_json)[0] == {"type": "text", "text": "Par"}
    assert lines(as_json)[1]["type"] == "error"
    assert lines(as_json)[1]["error"]["message"] == wanted


@pytest.mark.parametrize(
    ("status", "body", "headers", "message"),
    [
        (
            401,
            {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error", "code": "x"}},
            {},
            "Incorrect API key provided. Give a valid one with --api-key, or log in with: inferctl login (HTTP 401)",
        ),
        (
            404,
            {"error": {"message": "no model 'zip'", "param": "model", "code": "model_not_found"}},
            {},
            "no model 'zip' (HTTP 404)",
        ),
        (404, {"detail": "Not Found"}, {}, "{url} has no " + CHAT + " (Not Found). Is it an OpenAI-compatible server?"),
        (429, {"error": {"message": "slow down"}}, {"retry-after": "7"}, "slow down. Try again in 7 s (HTTP 429)"),
        (500, {"error": "out of memory"}, {}, "out of memory (HTTP 500)"),
        (502, b"<html><body>Bad Gateway</body></html>", {}, "the server gave no reason (HTTP 502)"),
        (503, b"", {"retry-after": "2"}, "the server is busy. Try again in 2 s (HTTP 503)"),
        (400, {"error": {"message": "bad \x1b[31mred"}}, {}, "bad [31mred (HTTP 400)"),
        (200, b"{}", {}, "{url}" + CHAT + " answered with application/json, not with an event stream"),
    ],
)
def test_error_statuses_become_messages(status: int, body: Any, headers: dict[str, str], message: str) -> None:
    with StubServer({CHAT: replying(status, body, headers)}) as server:
        result = run(server, "chat", "x")
    wanted = message.format(url=server.url)
    if status == 404 and "Is it" in wanted:
        wanted += " (HTTP 404)"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {wanted}\n")


def test_an_unreachable_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    message = f"cannot reach {url}: connection refused. Is the server running? Start it with: inferflux serve"
    result = CliRunner().invoke(inferctl, ["models", "--url", url])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {message}\n")
    as_json = CliRunner().invoke(inferctl, ["--url", url, "models", "--json"])
    assert as_json.exit_code == 1
    assert lines(as_json) == [{"type": "error", "error": {"message": message, "status": None, "code": None}}]


def test_a_silent_server_times_out() -> None:
    with StubServer({"/v1/models": Exchange.wait_for_disconnect}) as server:
        result = run(server, "models", "--timeout", "0.1")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {server.url} sent nothing for 0.1 s. Allow more with --timeout\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--url", "localhost:80", "models"], None, "'localhost:80' has no scheme. Write it as http://localhost:80"),
        (["models", "--url", "ftp://x"], None, "'ftp://x' is not an http or https URL with a host"),
        (["models", "--url", "http://h:99999"], None, "'http://h:99999' has no valid host and port"),
        (["--api-key", "a\nb", "models"], None, "the API key has a space or a character outside ASCII"),
        (["chat"], "", "the MESSAGE is empty"),
        (["chat"], b"\xff\xfe", "stdin is not UTF-8 text: byte 0 is not valid"),
        (["chat", "\udcff"], None, "an argument is not UTF-8 text"),
        (["chat", "x", "--max-tokens", "0"], None, "Invalid value for '--max-tokens'"),
        (["completion", "-"], " ", "the PROMPT is empty"),
        (["frobnicate"], None, "there is no command 'frobnicate'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], stdin: Any, message: str) -> None:
    result = CliRunner().invoke(inferctl, arguments, input=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_key_comes_from_the_environment_or_the_options() -> None:
    with StubServer() as server:
        runner = CliRunner(env={"INFERCTL_API_KEY": " sk-env\n", "INFERCTL_URL": server.url + "/v1/"})
        assert runner.invoke(inferctl, ["models"]).exit_code == 0
        assert runner.invoke(inferctl, ["models", "--api-key", "sk-sub"]).exit_code == 0
    assert [r.headers["authorization"] for r in server.requests] == ["Bearer sk-env", "Bearer sk-sub"]


# completion


def test_completion_echoes_the_prompt_and_sends_stop_words() -> None:
    with StubServer({COMPLETIONS: answering(" blue", " today", chat=False)}) as server:
        result = run(server, "completion", "The sky is", "--echo", "--stop", ".", "--stop", "\n", "--seed", "4")
    assert (result.exit_code, result.stdout) == (0, "The sky is blue today\n")
    sent = server.posts()[0].json
    assert (sent["prompt"], sent["stop"], sent["seed"]) == ("The sky is", [".", "\n"], 4)


def test_completion_from_stdin_without_streaming() -> None:
    answer = {"choices": [{"index": 0, "text": " blue", "finish_reason": "length"}]}
    with StubServer({COMPLETIONS: replying(200, answer)}) as server:
        plain = run(server, "completion", "-", "--no-stream", stdin="The sky is\n")
        as_json = run(server, "completion", "--no-stream", "--json", "--echo", stdin="The sky is\n")
    assert plain.stdout == " blue\n"
    assert server.posts()[0].json["prompt"] == "The sky is\n"  # a raw prompt is sent as it is
    assert lines(as_json) == [
        {"prompt": "The sky is\n", "model": "demo", "text": " blue", "finish_reason": "length", "usage": None}
    ]


def test_events_split_anywhere_and_comments_between() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.begin()
        stream = b": ping\r\n\r\n" + b"".join(
            b"data:" + json.dumps(text_chunk(word), ensure_ascii=False).encode() + b"\r\n\r\n" for word in ("é", "漢", "!")
        )
        for byte in stream + b"data: [DONE]\n\n":
            await exchange.chunk(bytes([byte]))
        await exchange.end(done=False)

    with StubServer({COMPLETIONS: handler}) as server:
        assert run(server, "completion", "x").stdout == "é漢!\n"


# models and status


MODELS = models_document(
    {
        "id": "demo",
        "inferflux": {
            "backend": "llamacpp",
            "max_model_len": 2048,
            "aliases": ["small", "chat"],
            "default": True,
            "state": "ready",
        },
    },
    {"id": "vllm-model", "owned_by": "vllm", "max_model_len": 4096},
    {"id": "gguf", "owned_by": "llamacpp", "aliases": ["gguf"], "meta": {"n_ctx_train": 8192}},
    {"id": "bare"},
)


def test_models_as_a_table_and_as_json() -> None:
    with StubServer({"/v1/models": replying(200, MODELS)}) as server:
        table = run(server, "models")
        as_json = run(server, "models", "--json")
        one = run(server, "models", "small", "--json")
    rows = [line.split() for line in table.stdout.splitlines() if line.strip()]
    assert rows[0] == ["model", "aliases", "context", "backend", "state"]
    assert rows[2:] == [
        ["demo", "small,", "chat", "2048", "llamacpp", "ready", "default"],
        ["vllm-model", "4096", "vllm", "–"],
        ["gguf", "8192", "llamacpp", "–"],
        ["bare", "–", "–", "–"],
    ]
    first = {
        "id": "demo",
        "aliases": ["small", "chat"],
        "max_model_len": 2048,
        "backend": "llamacpp",
        "state": "ready",
        "default": True,
    }
    assert lines(as_json)[0][0] == first
    assert lines(one) == [first]


def test_an_unknown_model() -> None:
    with StubServer({"/v1/models": replying(200, MODELS)}) as server:
        result = run(server, "models", "zip")
    assert result.exit_code == 1
    assert result.stderr == "Error: the server has no model 'zip'. It has: demo, vllm-model, gguf, bare\n"


HEALTH = {
    "status": "ok",
    "version": "0.1.0",
    "models": [
        {
            "name": "demo",
            "state": "ready",
            "requests_running": 2,
            "requests_waiting": 0,
            "kv_cache_usage_ratio": 0.25,
            "restarts": 1,
            "speculation": None,
        }
    ],
}


def test_status_of_a_ready_server() -> None:
    with StubServer({"/readyz": replying(200, {"status": "ready"}), "/healthz": replying(200, HEALTH)}) as server:
        table = run(server, "status")
        as_json = run(server, "status", "--json")
    assert (table.exit_code, as_json.exit_code) == (0, 0)
    rows = [line.split() for line in table.stdout.splitlines() if line.strip()]
    assert rows[0] == [server.url, "ready", "version", "0.1.0"]
    assert rows[-1] == ["demo", "ready", "2", "0", "25%", "1"]
    assert lines(as_json) == [
        {"url": server.url, "reachable": True, "ready": True, **HEALTH, "notes": []},
    ]


def test_status_of_a_server_that_is_not_ready() -> None:
    ready = replying(503, {"status": "draining"})
    with StubServer({"/readyz": ready, "/healthz": replying(200, {"status": "ok"})}) as server:
        result = run(server, "status")
    assert (result.exit_code, result.stdout) == (1, f"{server.url}  not ready\n  draining\n")


def test_status_of_a_server_without_these_routes() -> None:
    notes = [
        "the server has no /readyz: judged by whether it lists its models",
        "the server has no /healthz: no version and no figures",
    ]
    with StubServer() as server:
        result = run(server, "status")
        assert (result.exit_code, result.stdout) == (0, f"{server.url}  ready\n  {notes[0]}\n  {notes[1]}\n")
        server.routes["/v1/models"] = replying(503, {"error": {"message": "Loading model", "code": 503}})
        result = run(server, "status", "--json")
    assert result.exit_code == 1
    assert lines(result)[0]["notes"] == [notes[0], "Loading model (HTTP 503)", notes[1]]


def test_status_of_nothing() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = CliRunner().invoke(inferctl, ["status", "--json", "--url", url])
    assert result.exit_code == 1
    assert (lines(result)[0]["reachable"], lines(result)[0]["ready"]) == (False, False)
    assert lines(result)[0]["notes"][0].startswith(f"cannot reach {url}: connection refused. ")


# the program as installed


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom inferflux_core.cli.inferctl import main\nsys.argv = ['inferctl', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print([m for m in ('httpx', 'rich', 'prompt_toolkit', 'pydantic', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Talk to an InferFlux server" in done.stdout


def test_the_installed_command_ends_with_an_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "inferctl"), "--url", f"http://127.0.0.1:{free_port()}", "chat", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: cannot reach http://127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_during_a_single_answer_keeps_what_came() -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.event(chat_chunk("Paris"))
        await exchange.wait_for_disconnect()

    # A test run in the background hands its children an ignored SIGINT, which a terminal does not.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from inferflux_core.cli.inferctl import main; main()"
    )
    with StubServer({CHAT: endless}) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "--url", server.url, "chat", "hi"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.read(5) == b"Paris"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=10)
    assert (process.returncode, rest, errors) == (130, b"\n", b"\n")
