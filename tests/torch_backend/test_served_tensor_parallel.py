"""A model shared by two processes behind the real server: it answers, comes back when a rank dies, and ends with the server."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from served import ServedInferFlux, serving, until
from torch_backend.twin import demo_twin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TWIN = demo_twin()


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def answer(server: ServedInferFlux) -> str:
    body = {"model": "twin", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    text: str = server.post("/v1/completions", body).json()["choices"][0]["text"]
    return text


@pytest.fixture
def folder() -> Iterator[Path]:
    """For what the processes put into temporary folders: a short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="ifx-") as path:
        yield Path(path)


def test_a_shared_model_is_served(folder: Path) -> None:
    config = folder / "inferflux.yaml"
    torch_settings = {"tensor_parallel_size": 2, "num_threads": 1, "kv_cache_mib": 64, "device": "cpu"}
    config.write_text(json.dumps({"models": [{"source": str(TWIN), "name": "twin"}], "backends": {"torch": torch_settings}}))
    with serving(
        "--config", str(config), "--max-model-len", "256", "--max-num-seqs", "2", env={"TMPDIR": str(folder)}
    ) as server:
        assert "Paris" in answer(server)
        engine = server.engine_pid()
        (follower,) = children(engine)
        os.kill(follower, signal.SIGKILL)
        refused = server.post("/v1/completions", {"model": "twin", "prompt": "Hello", "max_tokens": 3})
        assert refused.status_code == 503
        until(lambda: server.health()["state"] == "ready" and server.health()["restarts"] == 1)
        assert "Paris" in answer(server)
        everyone = [engine := server.engine_pid(), *children(engine)]
        assert len(everyone) == 2
        assert not list(folder.glob("inferflux-ranks-*"))
        os.kill(everyone[1], signal.SIGSTOP)  # so that it cannot notice: the kernel has to end it
        server.process.kill()
        server.process.wait(30)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone))
