"""Engine processes for real: they answer, die, hang, are replaced, and leave nothing behind."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import inferflux_core.engine
from inferflux_core.engine import messages
from inferflux_core.engine.client import EngineState, OutputStream
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.process import ProcessEngineClient
from inferflux_core.engine.types import EngineOutput, EngineRequest, EngineStats, FinishReason, SamplingParams, TokenLogprobs
from inferflux_core.errors import EngineRestartedError, ModelFileError, ModelLoadingError, OverloadedError
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelInfo
from inferflux_core.plugins import load_plugins
from inferflux_core.settings import EngineSettings
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings

DEADLINE = 30.0
CRASH, HANG = ord("!"), ord("?")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets live: empty again when the engines are gone. Backoff is short, so that tests are."""
    monkeypatch.setattr("inferflux_core.engine.process._FIRST_BACKOFF", 0.02)
    monkeypatch.setattr("inferflux_core.engine.process._WATCH_SECONDS", 0.1)
    with tempfile.TemporaryDirectory(prefix="ifx-") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


def spec(backend: str = "fake", **settings: Any) -> EngineSpec:
    return EngineSpec(
        files=ModelFiles(ref="fake", format="fake", paths=()),
        backend=backend,
        backend_settings=settings,
        config=EngineConfig(max_num_seqs=2),
    )


def new_client(made: EngineSpec | None = None, **settings: Any) -> ProcessEngineClient:
    return ProcessEngineClient("test", made or spec(crash_token=CRASH, hang_token=HANG), EngineSettings(**settings))


@asynccontextmanager
async def engine(made: EngineSpec | None = None, **settings: Any) -> AsyncIterator[ProcessEngineClient]:
    client = new_client(made, **settings)
    try:
        async with asyncio.timeout(DEADLINE):
            await client.start()
        yield client
    finally:
        pid = client.pid
        await client.stop()
        assert pid is None or not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def modes(folder: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in folder.iterdir()]


async def until(condition: Callable[[], object]) -> None:
    """Returns as soon as something holds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  # there is no event for most of what is waited for
            await asyncio.sleep(0.01)


async def collect(stream: OutputStream) -> list[int]:
    """Tokens of the one request of this stream, to its end."""
    tokens: list[int] = []
    async with asyncio.timeout(DEADLINE):
        while True:
            for part in await stream.get():
                tokens += part.token_ids
                if part.finish_reason is not None:
                    return tokens


def submit(client: ProcessEngineClient, prompt: bytes = b"hello", **params: Any) -> OutputStream:
    stream = OutputStream()
    client.submit([make_request(prompt, **{"max_tokens": 20, **params})], stream)
    return stream


def endless(client: ProcessEngineClient) -> OutputStream:
    """A request that runs until something happens to it."""
    return submit(client, max_tokens=4000, ignore_eos=True)


def expected(prompt: bytes = b"hello") -> list[int]:
    config = EngineConfig(max_num_seqs=1)
    driver = EngineDriver(FakeRunner(FakeSettings(), config), config)
    return driver.generate(make_request(prompt, max_tokens=20))[0].token_ids


async def assert_it_recovers(client: ProcessEngineClient, restarts: int = 1) -> None:
    await until(lambda: client.state is EngineState.READY and client.restarts == restarts)
    assert await collect(submit(client)) == expected()


# --- the usual --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
async def test_it_answers_aborts_and_ends_by_itself(folder: Path, depth: int) -> None:
    async with engine(spec(depth=depth)) as client:
        assert modes(folder) == [0o700], "nobody else can connect"
        assert client.model_info is not None
        assert client.model_info.max_model_len == 4096
        assert await collect(submit(client)) == expected()
        stream = endless(client)
        await stream.get()
        client.abort(list(client._streams))
        await until(lambda: (client.stats.num_running, client.stats.kv_cache_usage) == (0, 0))
        assert client.restarts == 0
        process = client._process
    assert process is not None
    assert process.returncode == 0, "it was told to shut down, not killed"
    assert client.state is EngineState.STOPPED


async def test_signals_of_the_terminal_are_the_servers() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group; running requests get to finish."""
    async with engine(spec(step_ms=2.0)) as client:
        assert client.pid is not None
        stream = submit(client, max_tokens=50, ignore_eos=True)
        await stream.get()
        os.kill(client.pid, signal.SIGINT)
        os.kill(client.pid, signal.SIGTERM)
        await collect(stream)
        assert client.restarts == 0


@pytest.mark.parametrize("depth", [1, 2])
async def test_stop_fails_what_runs(depth: int) -> None:
    async with engine(spec(step_ms=1.0, depth=depth)) as client:
        stream = endless(client)
        await stream.get()
        process = client._process
    assert process is not None
    assert process.returncode == 0, "it took in what was in flight, and ended"
    with pytest.raises(ModelLoadingError, match="was unloaded"):
        await collect(stream)
    await client.stop()


def test_it_works_with_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with engine() as client:
            assert await collect(submit(client)) == expected()
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await assert_it_recovers(client)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- death ------------------------------------------------------------------------------------------------------------


async def test_killed_while_it_answers() -> None:
    async with engine(spec(step_ms=1.0), max_waiting_requests=1) as client:
        running = [endless(client) for _ in range(2)]
        waiting = endless(client)
        await running[0].get()
        with pytest.raises(OverloadedError):
            endless(client)
        first = client.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        late = OutputStream()
        client._line.clear()
        client.submit([make_request(b"sent to a dead process")], late)  # nobody has noticed yet: no error, but no answer
        for stream in (*running, waiting, late):
            with pytest.raises(EngineRestartedError, match="is being restarted"):
                await collect(stream)
        with pytest.raises(ModelLoadingError, match="is restarting"):
            client.check_ready()
        assert client.state is EngineState.RESTARTING
        assert client.last_error == "died of signal SIGKILL"
        await assert_it_recovers(client)
        assert client.pid != first
        for _ in range(3):  # the line is as empty as the new engine
            endless(client)
        with pytest.raises(OverloadedError):
            endless(client)


async def test_native_code_that_crashes_again_and_again() -> None:
    async with engine() as client:
        for restarts in (1, 2):
            with pytest.raises(EngineRestartedError):
                await collect(submit(client, b"bang!"))
            await assert_it_recovers(client, restarts)


async def test_an_exception_ends_the_process_with_a_traceback_and_no_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    async with engine() as client:
        stream = submit(client, b"my password is swordfish", logit_bias={10**6: 1.0}, temperature=0.7)
        with pytest.raises(EngineRestartedError):
            await collect(stream)
        assert client.last_error == "exited with status 1"
        await assert_it_recovers(client)
    errors = capfd.readouterr().err
    assert "Traceback (most recent call last)" in errors
    assert "IndexError" in errors
    assert "sampling.py" in errors
    assert "swordfish" not in errors
    assert ", ".join(map(str, b"swordfish")) not in errors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_it_dies_with_the_server(folder: Path) -> None:
    script = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.process import ProcessEngineClient
from inferflux_core.interfaces import ModelFiles
from inferflux_core.settings import EngineSettings
async def main():
    spec = EngineSpec(files=ModelFiles(ref="fake", format="fake", paths=()), backend="fake")
    client = ProcessEngineClient("test", spec, EngineSettings())
    await client.start()
    print(client.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    source = str(Path(inferflux_core.engine.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", script, source], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)}
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.kill()
    deadline = time.monotonic() + DEADLINE
    while is_alive(pid):
        assert time.monotonic() < deadline, "an engine without a server"
        time.sleep(0.01)
    for left in folder.iterdir():  # a killed server cannot tidy up
        for path in left.iterdir():
            path.unlink()
        left.rmdir()


# --- hanging ----------------------------------------------------------------------------------------------------------


async def test_a_stopped_process_is_replaced() -> None:
    async with engine(heartbeat_timeout_s=2.5) as client:
        stream = endless(client)
        await stream.get()
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        with pytest.raises(EngineRestartedError):
            await collect(stream)
        assert client.last_error == "gave no sign of life for 2 s"
        await assert_it_recovers(client)


async def test_a_step_that_hangs_is_replaced_though_the_process_lives() -> None:
    async with engine(step_timeout_s=0.5) as client:
        with pytest.raises(EngineRestartedError):
            await collect(submit(client, b"what?"))
        assert client.last_error == "was stuck in a step for 0 s"
        await assert_it_recovers(client)


async def test_long_steps_are_no_hang() -> None:
    """Two heartbeats fit into each of these steps."""
    async with engine(spec(step_ms=2200.0), heartbeat_timeout_s=2.0) as client:
        assert len(await collect(submit(client, max_tokens=1, ignore_eos=True))) == 1
        assert client.restarts == 0


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "message"), [(spec("nobody"), "nobody"), (spec(block_size=0), "block_size")])
async def test_what_cannot_be_loaded_says_why_and_is_not_tried_again(made: EngineSpec, message: str) -> None:
    client = new_client(made)
    with pytest.raises(ModelFileError, match=message):
        await client.start()
    assert client.state is EngineState.FAILED
    assert message in (client.last_error or "")
    assert client.restarts == 0
    with pytest.raises(ModelLoadingError, match="could not be loaded"):
        client.check_ready()
    await client.stop()


async def test_a_process_that_dies_while_loading() -> None:
    client = new_client(spec(load_s=60.0))
    loading = asyncio.create_task(client.start())
    await until(lambda: client.pid)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(ModelFileError, match="died of signal SIGKILL while loading"):
        await loading
    assert client.state is EngineState.FAILED
    await client.stop()


async def test_loading_has_a_time_limit() -> None:
    client = new_client(spec(load_s=60.0), load_timeout_s=0.3)
    with pytest.raises(ModelFileError, match="did not load within 0 s"):
        await client.start()
    await client.stop()


async def test_stop_while_it_loads_is_quick_and_ends_the_start() -> None:
    client = new_client(spec(load_s=60.0))
    loading = asyncio.create_task(client.start())
    await until(lambda: client.pid)
    pid = client.pid
    assert pid is not None
    async with asyncio.timeout(3):
        await client.stop()
    assert not is_alive(pid)
    with pytest.raises(ModelFileError, match=r"while it was being loaded|while loading"):
        await loading


async def test_stop_before_start() -> None:
    client = new_client()
    await client.stop()
    assert client.state is EngineState.STOPPED


async def test_without_a_process_to_be_had_it_fails_at_first_and_keeps_trying_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    client = new_client()
    with pytest.raises(ModelFileError, match="could not be run"):
        await client.start()
    await client.stop()
    monkeypatch.setattr(sys, "executable", python)
    async with engine(restart_backoff_max_s=0.05) as client:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.restarts >= 3)
        assert client.state is EngineState.RESTARTING
        monkeypatch.setattr(sys, "executable", python)
        await until(lambda: client.state is EngineState.READY)
        assert await collect(submit(client)) == expected()


# --- messages ---------------------------------------------------------------------------------------------------------


REQUEST = EngineRequest(
    request_id="r",
    prompt_token_ids=[1, 2, 300_000],
    params=SamplingParams(
        max_tokens=5, seed=2**64 - 1, logit_bias={7: -1.5}, stop_token_ids=frozenset({1, 2}), logprobs=0, min_p=0.25
    ),
    cache_salt="tenant\0salt",
    tenant="tenant",
    priority=-3,
    arrival_time=12.5,
)
OUTPUT = EngineOutput("r", [1, 2], FinishReason.LENGTH, 2, 1, [TokenLogprobs(-0.5, [(1, -0.5), (2, float("-inf"))])])


@pytest.mark.parametrize("message", [messages.Submit([REQUEST]), messages.Abort(["a", "b"]), messages.Shutdown()])
def test_messages_to_the_engine_survive_the_way(message: messages.ToEngine) -> None:
    assert messages.decode_to_engine(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        messages.Ready(ModelInfo(vocab_size=9, max_model_len=8, eos_token_ids=frozenset({1})), 1.5),
        messages.Failed("no such file"),
        messages.StepDone([OUTPUT], ["r"], EngineStats(num_running=3)),
        messages.Heartbeat(0.25),
    ],
)
def test_messages_to_the_server_survive_the_way(message: messages.ToServer) -> None:
    assert messages.decode_to_server(messages.encode(message)) == message


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_to_engine(messages.encode(messages.Heartbeat(1.0)))
    with pytest.raises(msgspec.DecodeError):
        messages.decode_to_engine(b"\x80\x04N.")  # None, pickled


def test_nothing_in_the_engine_can_unpickle() -> None:
    """Unpickling runs code; pyzmq's convenience methods pickle as well."""
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}
    for path in Path(inferflux_core.engine.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, path
        assert not re.search(r"(send|recv)_pyobj", source), path


def test_the_fake_backend_is_registered_by_name() -> None:
    """What the specification names is found again in the engine process."""
    assert "fake" in load_plugins().entries["backend"]
