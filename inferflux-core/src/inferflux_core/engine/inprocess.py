"""An engine in a thread of this process: for tests and for embedding. A crash of native code takes the process along."""

from __future__ import annotations

import asyncio
import queue
import threading
import time

from inferflux_core.engine.client import EngineClient, EngineState, WaitingLine
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.messages import Abort, Shutdown, Submit, ToEngine
from inferflux_core.engine.types import EngineOutput, EngineRequest
from inferflux_core.errors import EngineRestartedError, InferFluxError, ModelFileError, ModelLoadingError
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import EngineSettings


class InProcessEngineClient(EngineClient):
    """The same interface without a process: messages go through a queue to one engine thread."""

    def __init__(self, name: str, spec: EngineSpec, settings: EngineSettings, registry: PluginRegistry) -> None:
        super().__init__(
            name, WaitingLine(settings.max_waiting_requests, settings.max_waiting_tokens, spec.config.max_num_seqs)
        )
        self._spec = spec
        self._registry = registry
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        began = time.perf_counter()
        try:
            core = await asyncio.to_thread(EngineCore.build, self._spec, self._registry)
        except InferFluxError as error:
            self.last_error = str(error)
            self.state = EngineState.FAILED
            raise ModelFileError(str(error)) from error
        self._thread = threading.Thread(target=self._run, args=(core, self._loop), name=f"engine {self.name}", daemon=True)
        self._thread.start()
        self._on_ready(core.model_info, time.perf_counter() - began)

    async def stop(self) -> None:
        if self._thread is not None:
            self._inbox.put(Shutdown())
            await asyncio.to_thread(self._thread.join)
        self.state = EngineState.STOPPED
        self._fail_all(ModelLoadingError, f"The model {self.name!r} was unloaded.")

    def _send(self, requests: list[EngineRequest]) -> None:
        self._inbox.put(Submit(requests))

    def _send_abort(self, request_ids: list[str]) -> None:
        self._inbox.put(Abort(request_ids))

    def _run(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                outputs = self._receive(core)
                if outputs is None:
                    break
                outputs += core.step()
                loop.call_soon_threadsafe(self._on_step, outputs, core.scheduler.take_started(), core.stats())
        except Exception as error:
            loop.call_soon_threadsafe(self._on_crash, repr(error))
        finally:
            core.close()

    def _receive(self, core: EngineCore) -> list[EngineOutput] | None:
        """Outputs of what was in the queue; None to stop."""
        outputs: list[EngineOutput] = []
        block = not core.has_requests()
        while block or not self._inbox.empty():
            block = False
            match self._inbox.get():
                case Submit(requests):
                    outputs += [refused for request in requests if (refused := core.add(request)) is not None]
                case Abort(request_ids):
                    outputs += core.abort(request_ids)
                case Shutdown():
                    return None
        return outputs

    def _on_crash(self, reason: str) -> None:
        self.last_error = reason
        self.state = EngineState.FAILED
        self._fail_all(EngineRestartedError, f"The engine of model {self.name!r} failed.")
