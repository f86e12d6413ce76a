"""An engine in a process of its own: spawned, listened to, watched, and replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time

import msgspec
import zmq

from inferflux_core.engine.client import EngineClient, EngineState, WaitingLine
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.messages import (
    Abort,
    Failed,
    Heartbeat,
    Ready,
    Shutdown,
    StepDone,
    Submit,
    ToEngine,
    ToServer,
    decode_to_server,
    encode,
)
from inferflux_core.engine.types import EngineRequest
from inferflux_core.engine.worker import CANNOT_LOAD, WorkerSpec
from inferflux_core.errors import EngineRestartedError, ModelFileError, ModelLoadingError
from inferflux_core.settings import EngineSettings

logger = logging.getLogger("inferflux.engine")

_FIRST_BACKOFF = 0.5
# An engine that ran this long before it died starts its backoff over.
_STABLE_SECONDS = 60.0
_WATCH_SECONDS = 0.5
_STOP_SECONDS = 5.0


class ProcessEngineClient(EngineClient):
    """Supervises one engine process. Every incarnation gets its own pair of sockets, so nothing of a dead one arrives late."""

    def __init__(self, name: str, spec: EngineSpec, settings: EngineSettings) -> None:
        super().__init__(
            name, WaitingLine(settings.max_waiting_requests, settings.max_waiting_tokens, spec.config.max_num_seqs)
        )
        self._spec = spec
        self._settings = settings
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._process: asyncio.subprocess.Process | None = None
        self._inbox: zmq.Socket[bytes] | None = None
        self._outbox: zmq.Socket[bytes] | None = None
        self._inbox_fd = -1
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._first: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_sign = 0.0
        self._hung = False
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of the engine process, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        self._first = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.name}")
        await self._first

    async def stop(self) -> None:
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            if self.state is EngineState.READY:  # one that is still loading would not listen
                self._transmit(Shutdown())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            self._kill()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._first is not None and not self._first.done():
            self._first.set_exception(ModelFileError(f"the model {self.name!r} was unloaded while it was being loaded"))
        self.state = EngineState.STOPPED
        self._fail_all(ModelLoadingError, f"The model {self.name!r} was unloaded.")
        self._zmq.destroy(linger=0)

    def _send(self, requests: list[EngineRequest]) -> None:
        self._transmit(Submit(requests))

    def _send_abort(self, request_ids: list[str]) -> None:
        self._transmit(Abort(request_ids))

    def _transmit(self, message: ToEngine) -> None:
        if self._outbox is not None:
            self._outbox.send(encode(message), zmq.NOBLOCK)

    # --- one incarnation after the other ------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        backoff = _FIRST_BACKOFF
        while not self._stopping:
            began = time.monotonic()
            try:
                reason = await self._run_once()
            except Exception as error:  # no process to be had, or one that talks nonsense: the next one may do better
                logger.exception("engine of model %r cannot be supervised", self.name)
                reason = f"could not be run ({error})"
            finally:
                self._kill()
                self._close_sockets()
            if self._first is not None and not self._first.done():
                self._on_message(Failed(f"the engine process of model {self.name!r} {reason} while loading"))
            if self._stopping or self.state is EngineState.FAILED:
                return
            if time.monotonic() - began > _STABLE_SECONDS:
                backoff = _FIRST_BACKOFF
            self.last_error = reason
            self.state = EngineState.RESTARTING
            self.restarts += 1
            self._fail_all(
                EngineRestartedError, f"The engine of model {self.name!r} failed and is being restarted. Please retry."
            )
            logger.error("engine of model %r %s; restarting in %.1f s", self.name, reason, backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, self._settings.restart_backoff_max_s)

    async def _run_once(self) -> str:
        """Spawn a process and watch it until it is gone; returns what happened to it."""
        self._folder = tempfile.TemporaryDirectory(prefix="inferflux-")  # mode 0700: nobody else can connect
        inbox, outbox = (f"ipc://{self._folder.name}/{name}" for name in ("to-server", "to-engine"))
        self._inbox = self._zmq.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.bind(inbox)
        self._outbox = self._zmq.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.SNDHWM, 0)
        self._outbox.setsockopt(zmq.LINGER, 0)
        self._outbox.connect(outbox)  # the engine binds this one, so that messages wait for it and are never refused
        self._inbox_fd = int(self._inbox.getsockopt(zmq.FD))
        asyncio.get_running_loop().add_reader(self._inbox_fd, self._read)
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "inferflux_core.engine.worker", stdin=asyncio.subprocess.PIPE
        )
        worker = WorkerSpec(engine=self._spec, inbox=outbox, outbox=inbox, parent_pid=os.getpid())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.msgpack.encode(worker, enc_hook=str))
            await process.stdin.drain()
            process.stdin.close()
        return await self._watch(process)

    async def _watch(self, process: asyncio.subprocess.Process) -> str:
        spawned = self._last_sign = time.monotonic()
        self._hung = False
        gone = asyncio.create_task(process.wait())
        try:
            while not gone.done():
                await asyncio.wait([gone], timeout=_WATCH_SECONDS)
                self._read()  # the descriptor signals edges: one that came while nobody listened would be lost
                now = time.monotonic()
                if self.state is not EngineState.READY and now - spawned > self._settings.load_timeout_s:
                    return self._give_up(f"did not load within {self._settings.load_timeout_s:.0f} s")
                if now - self._last_sign > self._settings.heartbeat_timeout_s and self.state is EngineState.READY:
                    return self._give_up(f"gave no sign of life for {self._settings.heartbeat_timeout_s:.0f} s")
                if self._hung:
                    return self._give_up(f"was stuck in a step for {self._settings.step_timeout_s:.0f} s")
        finally:
            self._kill()
            await gone
            self._read()  # its last words
        status = process.returncode or 0
        if status == CANNOT_LOAD:
            await self._hear_why()
        return f"died of signal {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    async def _hear_why(self) -> None:
        """The process has sent why it cannot load the model, but that may be on its way still."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                while self.state is not EngineState.FAILED:
                    await asyncio.sleep(0.01)
                    self._read()

    def _give_up(self, reason: str) -> str:
        self._kill()
        return reason

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _close_sockets(self) -> None:
        if self._inbox is not None:
            asyncio.get_running_loop().remove_reader(self._inbox_fd)
            self._inbox.close(0)
        if self._outbox is not None:
            self._outbox.close(0)
        if self._folder is not None:
            self._folder.cleanup()
        self._inbox = self._outbox = self._folder = None

    # --- what it says -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Drain the socket: its file descriptor becomes readable once for any number of messages."""
        while self._inbox is not None and self._inbox.getsockopt(zmq.EVENTS):
            message = decode_to_server(self._inbox.recv())
            self._last_sign = time.monotonic()
            self._on_message(message)

    def _on_message(self, message: ToServer) -> None:
        match message:
            case StepDone(outputs, started, stats):
                self._on_step(outputs, started, stats)
            case Heartbeat(step_seconds):
                self._hung = step_seconds > self._settings.step_timeout_s
            case Ready(model_info, load_seconds):
                self._on_ready(model_info, load_seconds)
                logger.info("model %r is ready after %.2f s", self.name, load_seconds)
                if self._first is not None and not self._first.done():
                    self._first.set_result(None)
            case Failed(text):
                self.last_error = text
                self.state = EngineState.FAILED
                if self._first is not None and not self._first.done():
                    self._first.set_exception(ModelFileError(text))
