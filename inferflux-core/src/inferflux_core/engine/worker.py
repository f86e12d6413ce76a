"""The engine process: `python -m inferflux_core.engine.worker`, started by `client.py` only.

Its specification comes on standard input. One thread owns scheduler and runner; a second one only says that the process is
alive, so that a long step is not mistaken for a dead process, and a stopped process not for a long step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import zmq

from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.messages import (
    Abort,
    Failed,
    Heartbeat,
    Ready,
    Shutdown,
    StepDone,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)
from inferflux_core.engine.types import EngineOutput
from inferflux_core.errors import InferFluxError
from inferflux_core.plugins import load_plugins

logger = logging.getLogger("inferflux.engine")

HEARTBEAT_SECONDS = 1.0
# Exit status after a Failed message; an exception that nobody expected ends with 1.
CANNOT_LOAD = 3
_PR_SET_PDEATHSIG = 1


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the server process tells a new engine process.

    Attributes:
        inbox: ZeroMQ address to bind.
        outbox: ZeroMQ address to connect to.
        parent_pid: the server process; the engine dies with it.
    """

    engine: EngineSpec
    inbox: str
    outbox: str
    parent_pid: int


class _Pulse(threading.Thread):
    """Sends a heartbeat every second on a socket of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        super().__init__(name="inferflux-heartbeat", daemon=True)
        self._context = context
        self._address = address
        self._stopping = threading.Event()
        self.step_began: float | None = None

    def run(self) -> None:
        with self._context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._address)
            while not self._stopping.wait(HEARTBEAT_SECONDS):
                began = self.step_began
                with contextlib.suppress(zmq.Again):  # nobody takes it: the server is gone or stands still
                    socket.send(encode(Heartbeat(0.0 if began is None else time.monotonic() - began)), zmq.NOBLOCK)

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.step_began = time.monotonic()
        try:
            yield
        finally:
            self.step_began = None


class Worker:
    """Reads messages, steps the engine, writes one message a step."""

    def __init__(self, core: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes], pulse: _Pulse) -> None:
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._pulse = pulse
        self._running = True

    def run(self) -> None:
        """Until a Shutdown message."""
        while self._running:
            outputs = self._receive(block=not self._core.has_requests())
            with self._pulse.step():
                outputs += self._core.step()
            self._send(outputs)

    def _receive(self, block: bool) -> list[EngineOutput]:
        """Take in every message that is there; wait for the first one only when nothing is to be computed or in flight."""
        outputs: list[EngineOutput] = []
        # Asked before every read, since a zmq.Again costs more than the question: this runs between any two steps.
        while self._running and (block or self._inbox.getsockopt(zmq.EVENTS)):
            outputs += self._handle(decode_to_engine(self._inbox.recv()))
            block = False
        return outputs

    def _handle(self, message: ToEngine) -> list[EngineOutput]:
        match message:
            case Submit(requests):
                refused = (self._core.add(request) for request in requests)
                return [output for output in refused if output is not None]
            case Abort(request_ids):
                return self._core.abort(request_ids)
            case Shutdown():
                self._running = False
                return []

    def _send(self, outputs: list[EngineOutput]) -> None:
        self._outbox.send(encode(StepDone(outputs, self._core.scheduler.take_started(), self._core.stats())))


def main() -> int:
    """Load the model, say so, serve until told to stop. Returns the exit status."""
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WorkerSpec)
    _tie_to_parent(spec.parent_pid)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.LINGER, 2000)
    outbox.setsockopt(zmq.SNDHWM, 0)
    outbox.connect(spec.outbox)
    inbox = context.socket(zmq.PULL)
    inbox.setsockopt(zmq.RCVHWM, 0)
    inbox.bind(spec.inbox)
    pulse = _Pulse(context, spec.outbox)
    pulse.start()
    try:
        began = time.perf_counter()
        core = EngineCore.build(spec.engine, load_plugins(spec.engine.blocked_plugins))
        outbox.send(encode(Ready(core.model_info, time.perf_counter() - began)))
        Worker(core, inbox, outbox, pulse).run()
        core.close()
    except InferFluxError as error:
        outbox.send(encode(Failed(str(error))))
        return CANNOT_LOAD
    finally:
        pulse.stop()
        inbox.close(0)
        outbox.close()
        context.term()
    return 0


def _tie_to_parent(parent_pid: int) -> None:
    """Never outlive the server, leave signals to it, and write no core files full of prompts."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server finishes what runs and then says so
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the server died before prctl took hold
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
