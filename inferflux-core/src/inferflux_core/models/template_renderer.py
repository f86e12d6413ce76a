"""The server's end of `template_worker`: keeps its process alive, and ends it when it will not end by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferflux_core.errors import InvalidRequestError, ModelFileError, OverloadedError
from inferflux_core.models.worker_process import WorkerDiedError, WorkerProcess, frame

_WORKER = Path(__file__).with_name("template_worker.py")
_OK, _REFUSED, _LIMIT = b"o", b"r", b"l"  # see template_worker

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
        self._worker: WorkerProcess | None = None
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
        sent = frame(f'{{"seconds": {self._seconds}, "characters": {characters}, "variables": {text}}}')
        if not self._lock.acquire(timeout=_WALL_FACTOR * self._seconds):
            raise OverloadedError("the chat template of this model is busy with other requests; try again shortly")
        try:
            status, answer = self._exchange(sent, most=4 * characters + _OUTPUT_BASE)
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

    def _exchange(self, sent: bytes, most: int) -> tuple[bytes, str]:
        for retry in (True, False):
            try:
                if self._worker is None:
                    self._worker = self._start()
                return self._worker.exchange(sent, _WALL_FACTOR * self._seconds, most)
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

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(_WORKER)
        compiled = frame(json.dumps({"source": self._source, "seconds": _COMPILE_SECONDS}))
        status, answer = worker.exchange(compiled, _WALL_FACTOR * _COMPILE_SECONDS, most=_OUTPUT_BASE)
        if status != _OK:
            worker.kill()
            raise ModelFileError(
                f"the chat template cannot be used: {answer[:200]}; correct it, or give the model another one "
                f"with `chat_template`"
            )
        return worker


def _limit(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the chat template of this model {what} on these messages and was stopped; send less, or report it to the "
        f"administrator of this server",
        param="messages",
    )
