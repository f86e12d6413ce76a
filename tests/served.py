"""A real `inferflux serve` in a process of its own, for tests that go through the front door."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_READY = re.compile(r"is ready on (http://\S+)")


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition that the outside world will make true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.02)


class ServedInferFlux:
    """A running server.

    Attributes:
        url: base URL.
        log: what it wrote to standard error so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if (match := _READY.search(line)) is not None:
                self.url = match.group(1)
                self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        assert self._ready.wait(60)
        assert self.url, "".join(self.log)

    def get(self, path: str) -> tuple[int, Any]:
        response = httpx.get(self.url + path, timeout=30)
        return response.status_code, response.json()

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def health(self) -> dict[str, Any]:
        model: dict[str, Any] = self.get("/healthz")[1]["models"][0]
        return model

    def engine_pid(self) -> int:
        """Of the engine process of the first model."""
        for entry in Path("/proc").iterdir():
            mine = entry.name.isdigit() and _parent(entry) == self.process.pid
            if mine and b"inferflux_core.engine.worker" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        raise AssertionError("there is no engine process")

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


@contextmanager
def serving(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Iterator[ServedInferFlux]:
    """Start `inferflux serve` on a free port and wait until it is ready; stop it afterwards."""
    with starting(*args, env=env, cwd=cwd) as served:
        served.wait_ready()
        yield served


@contextmanager
def starting(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Iterator[ServedInferFlux]:
    """Start it without waiting."""
    process = subprocess.Popen(
        [sys.executable, "-m", "inferflux_core.cli.main", "serve", "--port", "0", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    served = ServedInferFlux(process)
    try:
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        served._reader.join(30)
        assert process.stderr is not None
        process.stderr.close()


def fake(**settings: object) -> list[str]:
    """Arguments that serve the fake backend with these settings of it."""
    return ["--model", "fake", "--set", f"backends.fake={json.dumps(settings)}"]


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Data of an SSE stream, up to [DONE]."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
