"""The server's end of `template_worker`: keeps its process alive, and ends it when it will not end by itself."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferflux_core.errors import InvalidRequestError, ModelFileError, OverloadedError

_WORKER = Path(__file__).with_name("template_worker.py")
_LENGTH = struct.Struct("<Q")
_OK, _REFUSED, _LIMIT = b"o", b"r", b"l"  # see template_worker

# what the worker sees of the environment: enough to find Jinja and the time zone, and none of the server's secrets
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")

_COMPILE_SECONDS = 5.0
_OUTPUT_FACTOR = 4  # characters of output for each one of input
_OUTPUT_BASE = 64 * 1024  # and this many besides
_WALL_FACTOR = 5  # the worker counts CPU seconds; on a busy machine they take longer than seconds of the clock

_LIMITS = {
    "output": "produced too much text",
    "memory": "needed too much memory",
    "recursion": "nested too deeply",
    "repetition": "repeated a text too often",
    "power": "computed too large a number",
}


class WorkerDiedError(Exception):
    """The process ended instead of answering.

    Attributes:
        out_of_time: it used up its CPU seconds, or did not answer for a multiple of them.
    """

    def __init__(self, *, out_of_time: bool) -> None:
        super().__init__("out of time" if out_of_time else "died")
        self.out_of_time = out_of_time


class TemplateRefusedError(Exception):
    """The template called `raise_exception` with this text, which may be long."""


class Renderer:
    """Renders one template in a process of its own. Thread-safe: one render at a time.

    Args:
        source: the template.
        seconds: CPU time of one render.

    Raises:
        ModelFileError: the template does not compile, or the process cannot be started.
    """

    def __init__(self, source: str, *, seconds: float) -> None:
        self._source = source
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        try:
            self._worker = self._start()
        except WorkerDiedError as error:
            reason = f"it takes more than {_COMPILE_SECONDS:g} s to compile" if error.out_of_time else "its compiler died"
            raise ModelFileError(
                f"the chat template cannot be used: {reason}; give the model another one with `chat_template`"
            ) from None
        except OSError as error:
            raise ModelFileError(f"the process for the chat template cannot be started: {error.strerror}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's output for these JSON values.

        Raises:
            TemplateRefusedError: the template itself refused.
            InvalidRequestError: the template failed, or hit a limit.
            OverloadedError: earlier renders of this template take too long.
        """
        text = json.dumps(variables, ensure_ascii=False)
        characters = _OUTPUT_FACTOR * len(text) + _OUTPUT_BASE
        frame = _frame(f'{{"seconds": {self._seconds}, "characters": {characters}, "variables": {text}}}')
        if not self._lock.acquire(timeout=_WALL_FACTOR * self._seconds):
            raise OverloadedError("the chat template of this model is busy with other requests; try again shortly")
        try:
            status, answer = self._exchange(frame, most=4 * characters + _OUTPUT_BASE)
        finally:
            self._lock.release()
        if status == _OK:
            return answer
        if status == _REFUSED:
            raise TemplateRefusedError(answer)
        if status == _LIMIT:
            raise _limit(_LIMITS.get(answer, "used too much"))
        raise InvalidRequestError(
            f"the chat template of this model failed on these messages ({answer[:80]}); check roles, contents and tools "
            f"against what the model expects",
            param="messages",
        )

    def close(self) -> None:
        """End the process. The renderer is not used again."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
                self._worker = None

    def _exchange(self, frame: bytes, most: int) -> tuple[bytes, str]:
        for retry in (True, False):
            try:
                if self._worker is None:
                    self._worker = self._start()
                return self._worker.exchange(frame, _WALL_FACTOR * self._seconds, most)
            except OSError as error:
                raise OverloadedError(
                    f"the process for the chat template cannot be started ({error.strerror}); try again shortly"
                ) from error
            except WorkerDiedError as error:
                self._worker = None
                if error.out_of_time:
                    raise _limit("took too long") from None
                if not retry:
                    raise _limit("ended its process") from None
        raise AssertionError("unreachable")

    def _start(self) -> _Worker:
        worker = _Worker()
        compiled = _frame(json.dumps({"source": self._source, "seconds": _COMPILE_SECONDS}))
        status, answer = worker.exchange(compiled, _WALL_FACTOR * _COMPILE_SECONDS, most=_OUTPUT_BASE)
        if status != _OK:
            worker.kill()
            raise ModelFileError(
                f"the chat template cannot be used: {answer[:200]}; correct it, or give the model another one "
                f"with `chat_template`"
            )
        return worker


class _Worker:
    """One running process and the two pipes to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own file
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C in the server's terminal must not end renders of draining requests
        )
        self.kill = weakref.finalize(self, _kill, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in = self._process.stdin.fileno()
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def exchange(self, frame: bytes, seconds: float, most: int) -> tuple[bytes, str]:
        """Send one frame and wait for the answer.

        Args:
            seconds: most time to wait, by the clock.
            most: bytes of the longest answer to accept.

        Raises:
            WorkerDiedError: no answer; the process is gone.
        """
        deadline = time.monotonic() + seconds
        try:
            view = memoryview(frame)
            while view:
                try:
                    view = view[os.write(self._in, view) :]
                except BlockingIOError:
                    self._wait(self._in, select.POLLOUT, deadline)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
            if not 1 <= length <= most:
                raise EOFError
            body = self._read(length, deadline)
        except TimeoutError:
            self.kill()
            raise WorkerDiedError(out_of_time=True) from None
        except (EOFError, BrokenPipeError):
            self.kill()
            raise WorkerDiedError(out_of_time=self._process.returncode == -signal.SIGPROF) from None
        return body[:1], body[1:].decode("utf-8", "surrogatepass")

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = os.read(self._out, length - len(data))
            except BlockingIOError:
                self._wait(self._out, select.POLLIN, deadline)
                continue
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def _frame(text: str) -> bytes:
    body = text.encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(body)) + body


def _limit(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the chat template of this model {what} on these messages and was stopped; send less, or report it to the "
        f"administrator of this server",
        param="messages",
    )
