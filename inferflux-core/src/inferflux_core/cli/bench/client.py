"""The load generator: sends scripts to one server, with so many clients or at such a rate, and keeps what came back."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import msgspec

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.bench.connection import Answer, Connection, StaleConnection
from inferflux_core.cli.bench.inquiry import Speculated
from inferflux_core.cli.bench.workloads import Script
from inferflux_core.cli.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load: its name in the report, where it is, and the model that it is asked for.

    Attributes:
        version: of the server, where it says.
        body: what every request to it says beyond what the workload says.
        cache_salt: keeps what it caches from other targets that are the same server; None where there is no other.
    """

    name: str
    endpoint: Endpoint
    model: str
    version: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request: `error` or an answer. Times are `time.perf_counter` seconds."""

    script: int
    turn: int
    prompt: str
    due: float  # when latency begins to count: the scheduled arrival, or without a schedule the sending
    answer: Answer | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """The generated text; empty for an error."""
        return "".join(self.answer.texts) if self.answer else ""


@dataclass(slots=True, kw_only=True)
class Run:
    """All requests of one alternation on one server."""

    samples: list[Sample]
    client_cpu_s: float  # what the generator itself took from the machine
    elapsed_s: float
    speculated: Speculated | None = None  # None: the server drafted nothing, or does not say


class LoadGenerator:
    """Sends requests to one target. A request that takes longer than `timeout_s` seconds counts as an error."""

    def __init__(self, target: Target, *, max_tokens: int, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._fields: dict[str, Any] = {
            "model": target.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": target.cache_salt,
        }
        self._idle: list[Connection] = []

    async def closed_loop(self, scripts: Sequence[Script], clients: int) -> Run:
        """Runs the scripts with so many clients, each of which sends its next request when the last is answered."""
        waiting = deque(enumerate(scripts))
        samples: list[Sample] = []

        async def client() -> None:
            while waiting:
                index, script = waiting.popleft()
                samples.extend(await self._converse(index, script, None))

        async def load() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(clients, len(scripts))):
                    group.create_task(client())

        return await self._measured(load, samples)

    async def open_loop(self, scripts: Sequence[Script], rate: float, rng: random.Random) -> Run:
        """Sends scripts at Poisson arrivals of `rate` a second, however many are still unanswered. Latency counts from
        the scheduled arrival, so that a server that falls behind cannot hide it by being sent to later."""
        samples: list[Sample] = []

        async def arrival(index: int, script: Script, due: float) -> None:
            samples.extend(await self._converse(index, script, due))

        async def load() -> None:
            due = perf_counter()
            async with asyncio.TaskGroup() as group:
                for index, script in enumerate(scripts):
                    await asyncio.sleep(max(0.0, due - perf_counter()))
                    group.create_task(arrival(index, script, due))
                    due += rng.expovariate(rate)

        return await self._measured(load, samples)

    async def _measured(self, load: Callable[[], Awaitable[None]], samples: list[Sample]) -> Run:
        cpu, began = process_time(), perf_counter()
        try:
            await load()
        finally:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
        samples.sort(key=lambda sample: (sample.script, sample.turn))
        return Run(samples=samples, client_cpu_s=process_time() - cpu, elapsed_s=perf_counter() - began)

    async def _converse(self, index: int, script: Script, due: float | None) -> list[Sample]:
        samples: list[Sample] = []
        for turn in range(len(script.messages)):
            prompt = script.prompt([sample.text for sample in samples])
            sample = Sample(script=index, turn=turn, prompt=prompt, due=due if due is not None else perf_counter())
            samples.append(sample)
            if turn and samples[-2].error is not None:
                sample.error = "not sent, because an earlier turn had failed"
                continue
            body = msgspec.json.encode(merged(self._fields, script.fields, self._target.body) | {"prompt": prompt})
            if due is None:
                sample.due = perf_counter()
            try:
                async with asyncio.timeout(self._timeout_s):
                    sample.answer = await self._post(body)
            except TimeoutError:
                sample.error = f"no complete answer within {self._timeout_s:g} s"
            except ApiError as error:
                sample.error = str(error)
        return samples

    async def _post(self, body: bytes) -> Answer:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._post_on(connection, body)
            except StaleConnection:
                continue
        return await self._post_on(await Connection.open(self._target.endpoint), body)

    async def _post_on(self, connection: Connection, body: bytes) -> Answer:
        try:
            answer = await connection.post("/v1/completions", body)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One object of several: a later one wins key by key, and its null takes a key away."""
    fields: dict[str, Any] = {}
    for layer in layers:
        fields.update(layer)
    return {key: value for key, value in fields.items() if value is not None}
