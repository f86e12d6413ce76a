"""The whole server, started as its user starts it, with an engine that needs no model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from served import ServedInferFlux, events, fake, serving, starting, until

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
LONG = {**CHAT, "ignore_eos": True, "max_tokens": 2000}


def stream(served: ServedInferFlux, body: dict[str, object]) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{served.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60)


def idle(served: ServedInferFlux) -> bool:
    health = served.health()
    return health["requests_running"] == 0 and health["requests_waiting"] == 0 and health["kv_cache_usage_ratio"] == 0


def test_starts_without_any_file_and_says_how_to_use_it(tmp_path: Path) -> None:
    with serving(*fake(), cwd=tmp_path) as served:
        assert served.get("/readyz")[0] == 200
        text = "".join(served.log)
        assert "model fake (default)" in text
        assert f"inferctl --url {served.url} chat" in text


def test_a_client_that_leaves_stops_its_generation() -> None:
    with serving(*fake(step_ms=20)) as served:
        with stream(served, LONG) as response:
            lines = response.iter_lines()  # kept: httpx closes the connection when the iterator goes
            next(lines)
            assert served.health()["requests_running"] == 1
        until(lambda: idle(served))
        # The same without streaming: the connection is closed while the answer is being made.
        connection = socket.create_connection(("127.0.0.1", httpx.URL(served.url).port))
        body = json.dumps(LONG).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        until(lambda: served.health()["requests_running"] == 1)
        connection.close()
        until(lambda: idle(served))
        metrics = httpx.get(f"{served.url}/metrics").text
        assert "inferflux_client_disconnects_total 2.0" in metrics


def test_kill_9_of_the_engine() -> None:
    with serving(*fake(step_ms=20)) as served:
        with stream(served, LONG) as response:
            received = events(response.iter_lines())
            next(received)
            next(received)
            os.kill(served.engine_pid(), signal.SIGKILL)
            *_, last = received
        assert last["error"]["type"] == "server_error"
        assert last["error"]["code"] == "engine_restarted"
        until(lambda: served.get("/readyz")[0] == 200)
        assert served.health()["restarts"] == 1
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        assert served.process.poll() is None


def test_kill_9_before_the_first_token_is_a_plain_503() -> None:
    with serving(*fake(step_ms=20), "--max-num-seqs", "1") as served, stream(served, LONG) as running:
        lines = running.iter_lines()
        next(lines)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(served.post("/v1/chat/completions", CHAT)))
        asking.start()
        until(lambda: served.health()["requests_waiting"] == 1)
        os.kill(served.engine_pid(), signal.SIGKILL)
        asking.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_restarted"
        assert int(answers[0].headers["retry-after"]) >= 1


def test_sigterm_drains() -> None:
    with serving(*fake(step_ms=20)) as served:
        with stream(served, {**LONG, "max_tokens": 60}) as response:
            received = events(response.iter_lines())
            next(received)
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.get("/readyz")[0] == 503)
            refused = served.post("/v1/chat/completions", CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            *_, last = received
        assert last["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(30) == 0


def test_a_second_sigterm_ends_at_once() -> None:
    with serving(*fake(step_ms=50)) as served, stream(served, LONG) as response:
        received = events(response.iter_lines())
        next(received)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: served.get("/readyz")[0] == 503)
        assert served.terminate() == 0


def test_the_queue_is_bounded() -> None:
    args = fake(step_ms=20)
    with serving(*args, "--max-num-seqs", "1", "--set", "engine.max_waiting_requests=1") as served:
        with stream(served, LONG) as first:
            lines = first.iter_lines()
            next(lines)
            waiting = threading.Thread(target=served.post, args=("/v1/chat/completions", CHAT))
            waiting.start()
            until(lambda: served.health()["requests_waiting"] == 1)
            refused = served.post("/v1/chat/completions", CHAT)
        waiting.join()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        until(lambda: idle(served))
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_context_length_is_refused_with_the_counts() -> None:
    with serving(*fake(max_model_len=64)) as served:
        body = {"model": "fake", "prompt": "x" * 60, "max_tokens": 10}
        refused = served.post("/v1/completions", body)
        assert refused.status_code == 400
        assert refused.json() == {
            "error": {
                "message": "This model's maximum context length is 64 tokens. However, you requested 71 tokens (61 in the "
                "prompt, 10 in the completion). Please reduce the length of either.",
                "type": "invalid_request_error",
                "param": "prompt",
                "code": "context_length_exceeded",
            }
        }
        assert served.post("/v1/completions", {**body, "max_tokens": 3}).status_code == 200
        huge = served.post("/v1/completions", {**body, "prompt": "x" * 9_000_000})
        assert (huge.status_code, huge.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_step_that_hangs_is_ended() -> None:
    args = fake(hang_token=ord("%"))
    with serving(*args, "--set", "engine.step_timeout_s=1.5") as served:
        answer = served.post("/v1/completions", {"model": "fake", "prompt": "%"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarted")
        until(lambda: served.get("/readyz")[0] == 200)
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_several_models_and_aliases(tmp_path: Path) -> None:
    config = tmp_path / "inferflux.yaml"
    config.write_text(
        "models:\n- source: 'fake:a'\n  name: a\n  aliases: [x]\n- source: 'fake:b'\n  name: b\n  default: true\n"
    )
    with serving("--config", str(config)) as served:
        for asked, answered in (("a", "a"), ("x", "a"), ("b", "b")):
            assert served.post("/v1/chat/completions", {**CHAT, "model": asked}).json()["model"] == answered
        unnamed = {key: value for key, value in CHAT.items() if key != "model"}
        assert served.post("/v1/chat/completions", unnamed).json()["model"] == "b"
        missing = served.post("/v1/chat/completions", {**CHAT, "model": "c"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_a_broken_model_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    config = tmp_path / "inferflux.yaml"
    config.write_text(f"models:\n- source: fake\n- source: {broken}\n")
    with serving("--config", str(config)) as served:
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        states = {model["name"]: model["state"] for model in served.get("/healthz")[1]["models"]}
        assert states == {"fake": "ready", "broken": "failed"}
        unavailable = served.post("/v1/chat/completions", {**CHAT, "model": "broken"})
        assert unavailable.status_code == 503


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ("models: [{source: missing.gguf}]", (), "missing.gguf"),
        ("model_roots: [/var/empty]\nmodels: [{source: /etc/passwd.gguf}]", (), "model_roots"),
        ("engine: {shceduler: fcfs}", (), "scheduler"),
        ("", ("--host", "0.0.0.0"), "insecure"),
        ("", ("--scheduler", "nobody"), "nobody"),
    ],
)
def test_what_cannot_be_served_is_said_and_ends_with_2(
    tmp_path: Path, content: str, args: tuple[str, ...], message: str
) -> None:
    config = tmp_path / "inferflux.yaml"
    config.write_text(content or "models: [{source: fake}]")
    with starting("--config", str(config), *args) as served:
        assert served.process.wait(60) == 2
        served._reader.join(10)
        text = "".join(served.log)
        assert message in text
        assert "Traceback" not in text


def test_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "inferflux_core.cli.main", "serve", *fake(), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr
