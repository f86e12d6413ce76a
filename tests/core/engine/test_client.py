"""Streams, the bounded line of waiting requests, and an engine in a thread of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from inferflux_core.engine.client import PROGRESS_SECONDS, EngineClient, EngineState, OutputStream, WaitingLine
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.inprocess import InProcessEngineClient
from inferflux_core.engine.types import EngineOutput, EngineRequest, EngineStats, FinishReason
from inferflux_core.errors import EngineRestartedError, ModelFileError, ModelLoadingError, OverloadedError
from inferflux_core.interfaces import EngineConfig, ModelFiles
from inferflux_core.plugins import load_plugins
from inferflux_core.settings import EngineSettings
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings

REGISTRY = load_plugins()
DEADLINE = 20.0


def output(request_id: str, *tokens: int, finish: FinishReason | None = None) -> EngineOutput:
    return EngineOutput(request_id, list(tokens), finish)


async def until(condition: Callable[[], object]) -> None:
    """Returns as soon as something holds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  # there is no event for most of what is waited for
            await asyncio.sleep(0.005)


async def collect(stream: OutputStream, requests: int = 1) -> dict[str, list[int]]:
    """Tokens by request id, to the end of all of them."""
    tokens: dict[str, list[int]] = {}
    async with asyncio.timeout(DEADLINE):
        while requests:
            for part in await stream.get():
                tokens.setdefault(part.request_id, []).extend(part.token_ids)
                requests -= part.finish_reason is not None
    return tokens


# --- streams ----------------------------------------------------------------------------------------------------------


class TestOutputStream:
    async def test_everything_since_the_last_look_at_once(self) -> None:
        stream = OutputStream()
        stream.push(output("a", 1))
        stream.push(output("b", 2))
        assert [o.request_id for o in await stream.get()] == ["a", "b"]
        stream.push(output("a", 3))
        assert [o.token_ids for o in await stream.get()] == [[3]]

    async def test_a_reader_waits_and_is_woken_once_for_many(self) -> None:
        stream = OutputStream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        assert not reader.done()
        for token in range(3):
            stream.push(output("a", token))
        assert [o.token_ids for o in await reader] == [[0], [1], [2]]

    async def test_a_failure_comes_after_what_has_arrived_and_stays(self) -> None:
        stream = OutputStream()
        stream.push(output("a", 1))
        stream.fail(EngineRestartedError("gone"))
        assert len(await stream.get()) == 1
        for _ in range(2):
            with pytest.raises(EngineRestartedError, match="gone"):
                await stream.get()

    async def test_a_failure_wakes_a_waiting_reader(self) -> None:
        stream = OutputStream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        stream.fail(EngineRestartedError("gone"))
        with pytest.raises(EngineRestartedError):
            await reader

    async def test_a_cancelled_reader_loses_nothing(self) -> None:
        stream = OutputStream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        reader.cancel()
        stream.push(output("a", 1))
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert [o.token_ids for o in await stream.get()] == [[1]]


# --- the waiting line -------------------------------------------------------------------------------------------------


def waiting(count: int, length: int = 10, first: int = 0) -> list[EngineRequest]:
    return [make_request([1] * length, request_id=f"w{first + i}") for i in range(count)]


class TestWaitingLine:
    @staticmethod
    def line(max_requests: int = 3, max_tokens: int = 100, num_slots: int = 0) -> WaitingLine:
        return WaitingLine(max_requests, max_tokens, num_slots)

    def test_bounded_by_requests(self) -> None:
        line = self.line()
        for request in waiting(3):
            line.check(1, 10)
            line.join(request)
        assert len(line) == 3
        with pytest.raises(OverloadedError, match="3 requests are waiting") as caught:
            line.check(1, 10)
        assert caught.value.status == 503
        assert caught.value.headers == {"Retry-After": "1"}
        line.leave("w1")
        line.check(1, 10)

    def test_bounded_by_prompt_tokens(self) -> None:
        line = self.line(max_requests=100)
        for request in waiting(2, 40):
            line.join(request)
        line.check(1, 20)
        with pytest.raises(OverloadedError, match="80 prompt tokens are waiting"):
            line.check(1, 21)

    def test_several_choices_of_one_request_come_together_or_not_at_all(self) -> None:
        line = self.line()
        line.join(waiting(1)[0])
        line.check(2, 20)
        with pytest.raises(OverloadedError):
            line.check(3, 30)
        assert len(line) == 1, "asking changes nothing"

    def test_what_goes_straight_to_a_slot_does_not_wait(self) -> None:
        line = self.line(max_requests=0, max_tokens=0, num_slots=2)
        for request in waiting(2, 1000):
            line.check(1, 1000)
            line.join(request)
        with pytest.raises(OverloadedError):
            line.check(1, 1)
        line.start("w0")
        line.start("w1")
        with pytest.raises(OverloadedError):
            line.check(1, 1)
        line.leave("w0")
        line.check(1, 1)

    def test_started_requests_give_their_tokens_back(self) -> None:
        line = self.line(max_requests=5, max_tokens=50, num_slots=1)
        for request in waiting(2, 25):
            line.join(request)
        line.start("w0")
        assert len(line) == 1
        line.check(1, 25)
        with pytest.raises(OverloadedError):
            line.check(1, 26)

    def test_telling_it_twice_or_of_strangers_changes_nothing(self) -> None:
        line = self.line(max_requests=1, num_slots=1)
        line.join(waiting(1)[0])
        for _ in range(2):
            line.start("w0")
            line.start("stranger")
        for _ in range(2):
            line.leave("w0")
            line.leave("stranger")
        assert len(line) == 0
        line.check(2, 20)
        with pytest.raises(OverloadedError):
            line.check(3, 30)

    def test_nothing_is_left_after_a_restart(self) -> None:
        line = self.line(num_slots=1)
        for request in waiting(3):
            line.join(request)
        line.start("w0")
        line.clear()
        line.check(4, 100)
        assert len(line) == 0

    def test_retry_after_is_the_time_in_which_half_of_the_line_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr("inferflux_core.engine.client.time.monotonic", lambda: now[0])
        line = self.line(max_requests=20)
        for request in waiting(20):
            line.join(request)
        assert line.retry_after() == 1.0, "nothing is known yet"
        for i in range(10):  # one start every two seconds
            line.start(f"w{i}")
            now[0] += 2
        assert line.retry_after() == pytest.approx(2 * 11 / 2)

    def test_retry_after_does_not_count_the_quiet_time_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr("inferflux_core.engine.client.time.monotonic", lambda: now[0])
        line = self.line(max_requests=100)
        for request in waiting(5):
            line.join(request)
            line.start(request.request_id)
        now[0] += 3600
        for request in waiting(20, first=100):
            line.join(request)
        for i in range(10):
            line.start(f"w{100 + i}")
            now[0] += 1
        assert line.retry_after() == pytest.approx(11 / 2)

    def test_retry_after_has_bounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr("inferflux_core.engine.client.time.monotonic", lambda: now[0])
        line = self.line(max_requests=100)
        for request in waiting(50):
            line.join(request)
        line.start("w0")
        line.start("w1")
        assert line.retry_after() == 1.0
        now[0] += 1000
        assert line.retry_after() == 60.0


# --- an engine in this process ----------------------------------------------------------------------------------------


def spec(backend: str = "fake", config: EngineConfig | None = None, **settings: Any) -> EngineSpec:
    return EngineSpec(
        files=ModelFiles(ref="fake", format="fake", paths=()),
        backend=backend,
        backend_settings=settings,
        config=config or EngineConfig(max_num_seqs=2),
    )


@asynccontextmanager
async def engine(made: EngineSpec | None = None, **settings: Any) -> AsyncIterator[EngineClient]:
    client = InProcessEngineClient("test", made or spec(), EngineSettings(**settings), REGISTRY)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def expected(requests: Sequence[EngineRequest]) -> dict[str, list[int]]:
    config = EngineConfig(max_num_seqs=1)
    driver = EngineDriver(FakeRunner(FakeSettings(), config), config, registry=REGISTRY)
    return {r.request_id: driver.generate(r)[0].token_ids for r in requests}


class TestInProcessEngineClient:
    @pytest.mark.parametrize("depth", [1, 2])
    async def test_requests_are_answered(self, depth: int) -> None:
        requests = [make_request(b"hello %d" % i, max_tokens=20) for i in range(5)]
        stream = OutputStream()
        async with engine(spec(depth=depth)) as client:
            assert client.state is EngineState.READY
            assert client.model_info is not None
            assert client.load_seconds is not None
            client.submit(requests, stream)
            assert await collect(stream, 5) == expected(requests)
            assert stream.started_at is not None
            await until(lambda: (client.stats.num_running, client.stats.kv_cache_usage) == (0, 0))
            assert client.stats.generation_tokens >= sum(map(len, expected(requests).values()))
            assert client.restarts == 0
        assert client.state is EngineState.STOPPED

    async def test_a_refused_request_is_answered_with_an_error(self) -> None:
        async with engine(spec(max_model_len=32)) as client:
            stream = OutputStream()
            client.submit([make_request([97] * 30, max_tokens=3)], stream)
            assert [o.finish_reason for o in await stream.get()] == [FinishReason.ERROR]

    async def test_abort_frees_and_nothing_more_arrives(self) -> None:
        async with engine() as client:
            stream = OutputStream()
            doomed = [make_request([97] * 40, max_tokens=4000, ignore_eos=True, seed=i) for i in range(3)]
            client.submit(doomed, stream)
            await stream.get()
            client.abort([r.request_id for r in doomed])
            await stream_is_drained(stream)
            await until(lambda: (client.stats.num_running, client.stats.num_waiting) == (0, 0))
            assert client.stats.kv_cache_usage == 0
            other = OutputStream()
            client.submit([make_request(b"x", max_tokens=3)], other)
            await collect(other)
            client.abort(["unknown", doomed[0].request_id])
            reader = asyncio.create_task(stream.get())
            await asyncio.sleep(0)
            assert not reader.done()
            reader.cancel()

    async def test_a_full_line_is_refused_at_once_and_leaves_no_trace(self) -> None:
        async with engine(max_waiting_requests=1) as client:
            stream = OutputStream()
            taken = [make_request([97 + i] * 5, max_tokens=50) for i in range(3)]
            client.submit(taken, stream)
            with pytest.raises(OverloadedError):
                client.submit([make_request([97] * 5)], OutputStream())
            assert set(await collect(stream, 3)) == {r.request_id for r in taken}
            client.submit([make_request([97] * 5, max_tokens=2)] * 1, stream)
            await collect(stream)

    async def test_what_cannot_be_sent_leaves_no_trace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with engine(max_waiting_requests=0) as client:

            def refuse(requests: list[EngineRequest]) -> None:
                raise OverflowError("Integer value out of range")

            with monkeypatch.context() as patch:
                patch.setattr(client, "_send", refuse)
                for _ in range(5):
                    with pytest.raises(OverflowError):
                        client.submit([make_request([97])], OutputStream())
            assert client.making_progress
            stream = OutputStream()
            client.submit([make_request([97], max_tokens=2), make_request([98], max_tokens=2)], stream)
            await collect(stream, 2)

    async def test_a_crash_fails_what_runs(self) -> None:
        async with engine() as client:
            stream = OutputStream()
            client.submit([make_request([97], max_tokens=9, logit_bias={10**6: 1.0})], stream)
            with pytest.raises(EngineRestartedError, match="'test' failed"):
                await collect(stream)
            assert client.state is EngineState.FAILED
            assert "IndexError" in (client.last_error or "")
            with pytest.raises(ModelLoadingError, match="could not be loaded"):
                client.submit([make_request([97])], OutputStream())

    async def test_stop_fails_what_runs(self) -> None:
        stream = OutputStream()
        async with engine(spec(step_ms=1.0)) as client:
            client.submit([make_request([97], max_tokens=4000, ignore_eos=True)], stream)
            await stream.get()
        with pytest.raises(ModelLoadingError, match="was unloaded"):
            await collect(stream)
        with pytest.raises(ModelLoadingError, match="was unloaded"):
            client.check_ready()

    @pytest.mark.parametrize(
        ("made", "message"), [(spec("nobody"), "nobody"), (spec(block_size=0), "block_size"), (spec(typo=1), "typo")]
    )
    async def test_what_cannot_be_loaded_says_why(self, made: EngineSpec, message: str) -> None:
        client = InProcessEngineClient("test", made, EngineSettings(), REGISTRY)
        assert client.state is EngineState.LOADING
        with pytest.raises(ModelLoadingError, match="is being loaded"):
            client.check_ready()
        with pytest.raises(ModelFileError, match=message):
            await client.start()
        assert client.state is EngineState.FAILED
        assert message in (client.last_error or "")
        await client.stop()


async def stream_is_drained(stream: OutputStream) -> None:
    """Take what had arrived before the abort."""
    stream.push(output("marker"))
    while (await stream.get())[-1].request_id != "marker":
        pass


class _DeafClient(EngineClient):
    """An engine that takes requests and never says anything."""

    async def start(self) -> None:
        self.state = EngineState.READY

    async def stop(self) -> None: ...

    def _send(self, requests: list[EngineRequest]) -> None: ...

    def _send_abort(self, request_ids: list[str]) -> None: ...


async def test_making_progress_notices_an_engine_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("inferflux_core.engine.client.time.monotonic", lambda: now[0])
    client = _DeafClient("deaf", WaitingLine(10, 1000, 1))
    await client.start()
    now[0] += 10 * PROGRESS_SECONDS
    assert client.making_progress, "nothing to do is no lack of progress"
    client.submit([make_request([1], request_id="r")], OutputStream())
    now[0] += PROGRESS_SECONDS - 1
    assert client.making_progress
    now[0] += 2
    assert not client.making_progress
    client._on_step([], [], EngineStats())
    assert client.making_progress


async def test_outputs_find_their_stream_and_the_line_follows() -> None:
    client = _DeafClient("deaf", WaitingLine(1, 1000, 1))
    await client.start()
    first, second = OutputStream(), OutputStream()
    client.submit([make_request([1], request_id="a")], first)
    client.submit([make_request([1], request_id="b")], second)
    with pytest.raises(OverloadedError):
        client.submit([make_request([1], request_id="c")], OutputStream())
    client._on_step([output("a", 5), output("unknown", 7)], ["a"], EngineStats(num_running=1))
    assert first.started_at is not None
    assert second.started_at is None
    assert client.stats.num_running == 1
    assert [o.token_ids for o in await first.get()] == [[5]]
    client._on_step([output("a", 6, finish=FinishReason.LENGTH), output("b", 8)], ["b"], EngineStats())
    assert [o.token_ids for o in await first.get()] == [[6]]
    assert [o.token_ids for o in await second.get()] == [[8]]
    client.submit([make_request([1], request_id="c")], OutputStream())
    client._on_step([output("a", 9)], [], EngineStats())  # late, and nobody's any more
    client.abort(["b", "c"])
    client.submit([make_request([1], request_id=f"d{i}") for i in range(2)], OutputStream())
