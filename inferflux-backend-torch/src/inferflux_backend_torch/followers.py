"""The other ranks of a shared model, as rank 0 sees them: processes that it starts, speaks to, watches and ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from inferflux_backend_torch.rank_messages import FROM_FOLLOWER, Channel, Failed, FollowerSpec, Lengths, Started, encode
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import EngineConfig, ModelFiles

T = TypeVar("T")

_MODULE = "inferflux_backend_torch.follower_process"
# Less than the server gives an engine process to stop.
_STOP_SECONDS = 3.0
# A dying process closes its channel some moments before its exit status can be had.
_STATUS_SECONDS = 1.0


class RankDied(RuntimeError):
    """A follower is gone, and with it a part of the model. Not an InferFluxError: the engine is to be restarted."""


class Followers:
    """Ranks 1 to size - 1, started when this is made.

    Attributes:
        processes: by rank - 1.
    """

    def __init__(self, files: ModelFiles, settings: TorchSettings, config: EngineConfig) -> None:
        size = settings.tensor_parallel_size
        # The kernel ends a follower with the thread that started it: right for the main thread only.
        parent_pid = os.getpid() if threading.current_thread() is threading.main_thread() else None
        self.processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._ended = False
        self._lost = threading.Event()
        self._watcher: threading.Thread | None = None
        for _ in range(1, size):
            ours, theirs = socket.socketpair()
            self._channels.append(Channel(ours))
            with theirs:
                command = [sys.executable, "-m", _MODULE]
                self.processes.append(subprocess.Popen(command, stdin=theirs.fileno()))  # noqa: S603 - nothing a user wrote
        for rank, channel in enumerate(self._channels, 1):
            spec = FollowerSpec(
                files=files,
                settings=settings.model_dump(mode="json"),
                config=config,
                rank=rank,
                size=size,
                parent_pid=parent_pid,
            )
            with contextlib.suppress(OSError):  # gone already: found out when its answer is waited for
                channel.send(spec)

    # --- while they load ----------------------------------------------------------------------------------------------

    def wait_started(self) -> None:
        """
        Raises:
            ModelFileError: one can't be a part of the model, with its reason.
            RankDied: one did not live so long.
        """
        for rank in range(1, len(self._channels) + 1):
            self._answer(rank, Started)

    def lengths(self) -> list[Lengths]:
        """Wait until all are loaded. Raises as `wait_started`."""
        return [self._answer(rank, Lengths) for rank in range(1, len(self._channels) + 1)]

    def _answer(self, rank: int, kind: type[T]) -> T:
        try:
            answer = self._channels[rank - 1].receive(FROM_FOLLOWER)
        except EOFError:
            raise self._death() from None
        if isinstance(answer, Failed):
            raise ModelFileError(f"tensor parallel rank {rank}: {answer.message}")
        assert isinstance(answer, kind), "answers come in the order of the questions"
        return answer

    # --- while they run -----------------------------------------------------------------------------------------------

    def send(self, message: msgspec.Struct) -> None:
        """To all of them.

        Raises:
            RankDied: one is gone.
        """
        data = encode(message)
        try:
            for channel in self._channels:
                channel.send_encoded(data)
        except OSError as error:
            raise self._death() from error

    def watch(self, on_death: Callable[[], None]) -> None:
        """From now on, call this when a follower dies, from another thread: rank 0 may be waiting for it on a device."""
        self._watcher = threading.Thread(target=self._watch, args=(on_death,), name="inferflux-ranks", daemon=True)
        self._watcher.start()

    def _watch(self, on_death: Callable[[], None]) -> None:
        poll = select.poll()
        for channel in self._channels:
            poll.register(channel.fileno(), select.POLLIN)  # they have nothing to say, so this is the end of one
        poll.poll()
        if not self._ended:
            self._lost.set()
            on_death()

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Around what does not work without them.

        Raises:
            RankDied: in place of what its death led to, be that an error or a result.
        """
        try:
            yield
        except RuntimeError as error:
            if self._dead(_STATUS_SECONDS):
                raise self._death() from error
            raise
        if self._lost.is_set():
            raise self._death()

    def _dead(self, seconds: float) -> list[int]:
        """Ranks that are dead; waits so long for the first."""
        deadline = time.monotonic() + seconds
        while True:
            dead = [rank for rank, process in enumerate(self.processes, 1) if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                return dead
            time.sleep(0.01)

    def _death(self) -> RankDied:
        dead = self._dead(_STATUS_SECONDS)
        if not dead:
            return RankDied("a tensor parallel rank does not listen any more")
        status = self.processes[dead[0] - 1].returncode
        how = f"died of signal {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return RankDied(f"tensor parallel rank {dead[0]} {how}; what it wrote to the log says why")

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Tell them that nothing more will come."""
        self._ended = True
        for channel in self._channels:
            with contextlib.suppress(OSError):  # gone already
                channel.end()

    def close(self, patience: float = _STOP_SECONDS) -> None:
        """End them, and kill those that still run after so many seconds. Leaves no process behind."""
        self.end()
        deadline = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher is not None:
            self._watcher.join()
        for channel in self._channels:
            channel.close()
