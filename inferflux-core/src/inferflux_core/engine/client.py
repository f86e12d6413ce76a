"""What the server process knows of an engine, whether it runs in its own process or in this one."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from enum import StrEnum

from inferflux_core.engine.types import EngineOutput, EngineRequest, EngineStats
from inferflux_core.errors import EngineRestartedError, ModelLoadingError, OverloadedError, RequestError
from inferflux_core.interfaces import ModelInfo

# A step with work to do should report within this many seconds, or the engine does not count as making progress.
PROGRESS_SECONDS = 30.0


class EngineState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class OutputStream:
    """Where the outputs of one or several engine requests of one client request arrive.

    One reader, in the event loop. Whatever arrived since the last look is handed over at once, so a reader that is slower
    than the engine gets longer pieces instead of a longer queue of wake-ups.
    """

    __slots__ = ("_error", "_outputs", "_waiter", "started_at")

    def __init__(self) -> None:
        self.started_at: float | None = None
        self._outputs: list[EngineOutput] = []
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, error: RequestError) -> None:
        """The engine is gone; raised to the reader after what has arrived."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> list[EngineOutput]:
        """What has arrived since the last call, if anything."""
        outputs, self._outputs = self._outputs, []
        return outputs

    async def get(self) -> list[EngineOutput]:
        """Everything since the last call; waits for at least one output.

        Raises:
            RequestError: the engine failed, and nothing more will come.
        """
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()


class WaitingLine:
    """Requests that were sent to the engine and have not started, bounded by number and by prompt tokens.

    Kept in the server process, so that an overloaded server says no at once and not after the current step.
    """

    def __init__(self, max_requests: int, max_tokens: int, num_slots: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tokens: dict[str, int] = {}
        self._total = 0
        self._starts: deque[float] = deque(maxlen=32)
        # Requests that go straight to a slot never wait: they are not to be counted against the line.
        self.num_slots = num_slots
        self._running: set[str] = set()

    def __len__(self) -> int:
        return len(self._tokens)

    def check(self, num_requests: int, num_tokens: int) -> None:
        """Raises OverloadedError if so many more would not fit."""
        free = max(0, self.num_slots - len(self._running))
        waiting = len(self._tokens) + num_requests - free
        if waiting > self._max_requests:
            raise OverloadedError(
                f"The server is overloaded: {len(self._tokens)} requests are waiting already. Please retry later.",
                retry_after=self.retry_after(),
            )
        if waiting > 0 and self._total + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"The server is overloaded: {self._total} prompt tokens are waiting already. Please retry later.",
                retry_after=self.retry_after(),
            )

    def retry_after(self) -> float:
        """Seconds until about half of those waiting have started, at the pace of the last starts; 1 to 60."""
        if len(self._starts) < 2:
            return 1.0
        pace = (time.monotonic() - self._starts[0]) / len(self._starts)
        return min(60.0, max(1.0, pace * (len(self._tokens) + 1) / 2))

    def join(self, request: EngineRequest) -> None:
        if not self._tokens:
            self._starts.clear()  # the pace is that of this queue, not of the quiet time before it
        self._tokens[request.request_id] = len(request.prompt_token_ids)
        self._total += len(request.prompt_token_ids)

    def start(self, request_id: str) -> None:
        if self._drop(request_id):
            self._running.add(request_id)
            self._starts.append(time.monotonic())

    def leave(self, request_id: str) -> None:
        self._drop(request_id)
        self._running.discard(request_id)

    def _drop(self, request_id: str) -> bool:
        tokens = self._tokens.pop(request_id, None)
        self._total -= tokens or 0
        return tokens is not None

    def clear(self) -> None:
        self._tokens.clear()
        self._running.clear()
        self._total = 0


class EngineClient(ABC):
    """Submits requests to an engine and hands their outputs out. Event loop only.

    Attributes:
        state: whether requests are taken now.
        model_info: set once the engine has been ready.
        stats: of the last step.
        restarts: times the engine was replaced.
        last_error: why it failed or restarts, for administrators.
        load_seconds: of the last load.
    """

    def __init__(self, name: str, line: WaitingLine) -> None:
        self.name = name
        self.state = EngineState.LOADING
        self.model_info: ModelInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.last_error: str | None = None
        self.load_seconds: float | None = None
        self._line = line
        self._streams: dict[str, OutputStream] = {}
        self._last_progress = time.monotonic()

    @abstractmethod
    async def start(self) -> None:
        """Load the model; returns when it is ready.

        Raises:
            ModelFileError: the model cannot be loaded.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End the engine. Requests still running fail with ModelLoadingError."""

    @abstractmethod
    def _send(self, requests: list[EngineRequest]) -> None: ...

    @abstractmethod
    def _send_abort(self, request_ids: list[str]) -> None: ...

    def submit(self, requests: list[EngineRequest], stream: OutputStream) -> None:
        """Queue all of these or none; their outputs arrive in the stream.

        Raises:
            ModelLoadingError: the engine is not ready.
            OverloadedError: the queue is full.
        """
        self.check_ready()
        self._line.check(len(requests), sum(len(r.prompt_token_ids) for r in requests))
        if not self._streams:
            self._last_progress = time.monotonic()
        self._send(requests)  # first: what cannot be sent leaves no trace
        for request in requests:
            self._line.join(request)
            self._streams[request.request_id] = stream

    def check_ready(self) -> None:
        """Raises ModelLoadingError if requests would not be taken now."""
        if self.state is not EngineState.READY:
            reason = {
                EngineState.LOADING: "is being loaded",
                EngineState.RESTARTING: "is restarting after a failure",
                EngineState.FAILED: "could not be loaded",
                EngineState.STOPPED: "was unloaded",
            }[self.state]
            raise ModelLoadingError(f"The model {self.name!r} {reason}. Please retry later.", retry_after=2.0)

    def abort(self, request_ids: list[str]) -> None:
        """End requests wherever they are; nothing more arrives for them. Unknown ids are ignored."""
        alive = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        for request_id in alive:
            self._line.leave(request_id)
        if alive and self.state is EngineState.READY:
            self._send_abort(alive)

    @property
    def num_requests(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._streams)

    @property
    def making_progress(self) -> bool:
        """False when there is work and no step has come back for a long time."""
        return not self._streams or time.monotonic() - self._last_progress < PROGRESS_SECONDS

    # --- what implementations report ----------------------------------------------------------------------------------

    def _on_step(self, outputs: list[EngineOutput], started: list[str], stats: EngineStats) -> None:
        self.stats = stats
        now = self._last_progress = time.monotonic()
        for request_id in started:
            self._line.start(request_id)
            waiting = self._streams.get(request_id)
            if waiting is not None and waiting.started_at is None:
                waiting.started_at = now
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.request_id]
                self._line.leave(output.request_id)
            stream.push(output)

    def _on_ready(self, model_info: ModelInfo, load_seconds: float) -> None:
        self.model_info = model_info
        self.load_seconds = load_seconds
        self.stats = EngineStats()
        self._last_progress = time.monotonic()
        self.state = EngineState.READY

    def _fail_all(self, error: type[EngineRestartedError] | type[ModelLoadingError], message: str) -> None:
        streams = {id(stream): stream for stream in self._streams.values()}
        self._streams.clear()
        self._line.clear()
        for stream in streams.values():
            stream.fail(error(message))
