"""Grammars are compiled in a process of their own, within time and memory, and their verdicts are remembered."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from inferflux_core.errors import InvalidRequestError, OverloadedError
from inferflux_core.models.structured import checker as module
from inferflux_core.models.structured.checker import GrammarChecker
from inferflux_core.models.structured.json_schema import schema_grammar
from inferflux_core.settings import StructuredOutputSettings

SETTINGS = StructuredOutputSettings(cache_entries=2, cache_tenants=2)
Make = Callable[..., GrammarChecker]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[GrammarChecker] = []

    def one(settings: StructuredOutputSettings = SETTINGS, **more: object) -> GrammarChecker:
        made.append(GrammarChecker(settings, **more))  # type: ignore[arg-type]  # what a test gives
        return made[-1]

    yield one
    for each in made:
        await each.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inferflux-grammars")]


async def reason(checker: GrammarChecker, grammar: str, tenant: str = "t") -> str | None:
    try:
        await checker.check(grammar, tenant=tenant, param="p")
    except InvalidRequestError as error:
        return error.message
    return None


async def test_verdicts_and_what_is_observed(make: Make) -> None:
    seen: list[str] = []
    checker = make(on_compiled=lambda seconds, outcome: seen.append(outcome) if seconds > 0 else None)
    await checker.start()
    assert seen == ["ok"] or seen == []
    seen.clear()
    schema = schema_grammar({"type": "object"}, param="p", limits=SETTINGS)
    assert await reason(checker, schema) is None
    assert await reason(checker, schema) is None
    assert seen == ["ok"]
    unknown = "start: x"
    message = "Invalid grammar for 'p': it cannot be compiled: unknown name: \"x\" (line 1, column 8)."
    assert [await reason(checker, unknown) for _ in range(2)] == [message, message]
    assert seen == ["ok", "refused"]


async def test_a_schema_that_nothing_satisfies_is_called_one(make: Make) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await make().check('start: %json {"type": "string", "pattern": "^a$", "minLength": 2}', tenant="t", param="p")
    assert caught.value.message == "Invalid schema for 'p': it describes nothing: no text can satisfy all of it."
    assert caught.value.code == "invalid_json_schema"


async def test_control_tokens_of_tool_grammars_pass(make: Make) -> None:
    assert await reason(make(), 'start: <[151657]> "x" <[3]>') is None


async def test_tenants_share_no_verdicts_and_the_oldest_go_first(make: Make) -> None:
    seen: list[str] = []
    checker = make(on_compiled=lambda seconds, outcome: seen.append(outcome))
    one, two, three = (f'start: "{name}"' for name in ("one", "two", "three"))

    async def is_new(grammar: str, tenant: str = "a") -> bool:
        before = len(seen)
        await checker.check(grammar, tenant=tenant, param="p")
        return len(seen) > before

    assert [await is_new(one), await is_new(one), await is_new(one, "b")] == [True, False, True]
    assert [await is_new(two), await is_new(one), await is_new(three)] == [True, False, True]
    assert [await is_new(one), await is_new(two)] == [False, True]  # two was the oldest of two
    assert [await is_new(one, "c"), await is_new(one, "b")] == [True, True]  # b was the oldest of two tenants


async def test_equal_grammars_at_once_are_checked_once(make: Make) -> None:
    seen: list[str] = []
    checker = make(on_compiled=lambda seconds, outcome: seen.append(outcome))
    assert await asyncio.gather(*(reason(checker, 'start: "x"') for _ in range(20))) == [None] * 20
    assert seen == ["ok"]


async def test_a_client_that_leaves_does_not_end_the_check_of_others(make: Make) -> None:
    checker = make()
    first = asyncio.create_task(reason(checker, 'start: "x"'))
    second = asyncio.create_task(reason(checker, 'start: "x"'))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is None
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_too_many_at_once_are_refused(make: Make) -> None:
    seen: list[str] = []
    checker = make(on_compiled=lambda seconds, outcome: seen.append(outcome))
    found = await asyncio.gather(*(reason(checker, f'start: "{n}"') for n in range(80)), return_exceptions=True)
    assert found.count(None) == 64
    assert sum(isinstance(each, OverloadedError) for each in found) == 16
    assert (seen.count("ok"), seen.count("busy")) == (64, 16)
    assert await reason(checker, 'start: "79"') is None


async def test_a_process_that_dies_is_started_again(make: Make) -> None:
    checker = make()
    assert await reason(checker, 'start: "x"') is None
    worker = checker._worker
    assert worker is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert await reason(checker, 'start: "y"') is None
    assert checker._worker is not worker


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", "takes more than 0.2 s to compile; make patterns and repetitions smaller"),
        ("bytearray(1 << 30)", "is too complex to be enforced; make patterns, repetitions and choices smaller"),
        ("os.abort()", "needs too much memory to compile; make patterns and repetitions smaller"),
    ],
)
async def test_limits_end_a_check_and_the_next_works(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    """What the library would do to an input that nobody found yet."""
    source = module._WORKER.read_text("utf-8")
    hostile = source.replace("    matcher = LLM", f'    if "bomb" in grammar:\n        {body}\n    matcher = LLM')
    assert hostile != source
    script = tmp_path / "worker.py"
    script.write_text(hostile)
    monkeypatch.setattr(module, "_WORKER", script)
    checker = make(StructuredOutputSettings(compile_timeout_s=0.2))
    assert await reason(checker, 'start: "bomb"') == f"Invalid grammar for 'p': it {message}."
    assert await reason(checker, 'start: "x"') is None


async def test_a_process_that_cannot_be_started_is_no_verdict(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    checker = make()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", fail)
        with pytest.raises(OverloadedError, match="Resource temporarily unavailable"):
            await checker.check('start: "x"', tenant="t", param="p")
    assert await reason(checker, 'start: "x"') is None


def read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


async def test_the_process_knows_nothing_of_the_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERFLUX_SECRET", "hush")
    checker = make()
    await checker.start()
    assert checker._worker is not None
    environment, limits = (read(checker._worker._process.pid, name) for name in ("environ", "limits"))
    assert "hush" not in environment
    core, space = (next(line for line in limits.splitlines() if line.startswith(name)) for name in ("Max core", "Max address"))
    assert core.split()[4] == "0"
    assert space.split()[3] != "unlimited"


async def test_close_ends_what_waits(make: Make) -> None:
    checker = make()
    waiting = [asyncio.create_task(reason(checker, f'start: "{n}"')) for n in range(10)]
    await asyncio.sleep(0)
    await checker.close()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(each is None or isinstance(each, OverloadedError) for each in found)
    assert checker._worker is None
