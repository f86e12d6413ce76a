"""Whether a grammar can be held, found out in a process of its own before an engine sees it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inferflux_core.errors import InvalidRequestError, OverloadedError
from inferflux_core.models.worker_process import WorkerDiedError, WorkerProcess, frame
from inferflux_core.settings import StructuredOutputSettings

_WORKER: Final = Path(__file__).with_name("grammar_worker.py")
_OK, _REFUSED = b"o", b"r"  # see grammar_worker
_PROBE: Final = 'start: "x"\n'

_MAX_WAITING: Final = 64  # grammars that wait for the process; at the default limit that is at worst two minutes of CPU time
_WALL_FACTOR: Final = 5  # the worker counts CPU seconds; on a busy machine they take longer than seconds of the clock
_MAX_ANSWER: Final = 4096  # bytes


@dataclass(frozen=True, slots=True)
class _Verdict:
    reason: str | None  # None: it can be held
    outcome: str  # `ok`, `refused` or `timeout`
    is_lasting: bool = True  # False where the process was ended, which a busy machine or an administrator may have done


class GrammarChecker:
    """Checks grammars, one at a time, and remembers the verdicts of each tenant within bounds.

    Equal grammars of one tenant that come while the first is being checked wait for its verdict. How long a check takes tells
    nobody what other tenants sent.

    Args:
        on_compiled: called with the seconds a check took, waiting included, and its outcome: `ok`, `refused`, `timeout` or
            `busy`. Not called for verdicts that are remembered.
    """

    def __init__(self, settings: StructuredOutputSettings, *, on_compiled: Callable[[float, str], None] | None = None) -> None:
        self._settings = settings
        self._on_compiled = on_compiled
        self._verdicts: OrderedDict[str, OrderedDict[bytes, _Verdict]] = OrderedDict()
        self._waiting: dict[tuple[str, bytes], asyncio.Task[_Verdict]] = {}
        self._thread = ThreadPoolExecutor(1, "inferflux-grammars")
        self._worker: WorkerProcess | None = None  # used by the thread; `close` may interrupt it
        self._closed = False

    async def start(self) -> None:
        """Start the process, so that the first request does not wait for it. Failing is no harm: `check` starts it again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, _PROBE)

    async def check(self, grammar: str, *, tenant: str, param: str) -> None:
        """Return if the grammar can be held.

        Args:
            param: wire name of the field that asks for it.

        Raises:
            InvalidRequestError: it cannot, and why.
            OverloadedError: too many grammars wait to be checked, or the process cannot be started.
        """
        digest = hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        verdict = self._remembered(tenant, digest)
        if verdict is None:
            task = self._waiting.get((tenant, digest))
            if task is None:
                task = self._begin(grammar, tenant, digest)
            verdict = await asyncio.shield(task)  # others may wait for it: one client that leaves must not end it
        if verdict.reason is not None:
            is_schema = grammar.startswith("start: %json")
            raise InvalidRequestError(
                f"Invalid {'schema' if is_schema else 'grammar'} for {param!r}: it {verdict.reason}.",
                param=param,
                code="invalid_json_schema" if is_schema else "invalid_grammar",
            )

    async def close(self) -> None:
        """End the process and what waits for it. The checker is not used again."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            worker.interrupt()
        tasks = list(self._waiting.values())
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _begin(self, grammar: str, tenant: str, digest: bytes) -> asyncio.Task[_Verdict]:
        if len(self._waiting) >= _MAX_WAITING:
            self._observe(0.0, "busy")
            raise OverloadedError("too many grammars and schemas wait to be checked; try again shortly")
        task = asyncio.get_running_loop().create_task(self._judge(grammar, tenant, digest))
        self._waiting[tenant, digest] = task
        task.add_done_callback(lambda done: self._end(done, tenant, digest))
        return task

    def _end(self, task: asyncio.Task[_Verdict], tenant: str, digest: bytes) -> None:
        self._waiting.pop((tenant, digest), None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may be left to ask

    async def _judge(self, grammar: str, tenant: str, digest: bytes) -> _Verdict:
        begun = time.perf_counter()
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, grammar)
        except OverloadedError:
            self._observe(time.perf_counter() - begun, "busy")
            raise
        self._observe(time.perf_counter() - begun, verdict.outcome)
        if verdict.is_lasting:
            self._remember(tenant, digest, verdict)
        return verdict

    def _compile(self, grammar: str) -> _Verdict:
        """In the thread."""
        seconds = self._settings.compile_timeout_s
        sent = frame(json.dumps({"grammar": grammar, "seconds": seconds}))
        for retry in (True, False):
            if self._closed:
                raise OverloadedError("this server is shutting down")
            try:
                if self._worker is None:
                    self._worker = WorkerProcess(_WORKER)
                status, text = self._worker.exchange(sent, _WALL_FACTOR * seconds, _MAX_ANSWER)
            except OSError as error:
                raise OverloadedError(
                    f"the process that checks grammars cannot be started ({error.strerror}); try again shortly"
                ) from error
            except WorkerDiedError as error:
                self._worker = None
                if error.out_of_time:
                    return _Verdict(
                        f"takes more than {seconds:g} s to compile; make patterns and repetitions smaller",
                        "timeout",
                        is_lasting=False,
                    )
                if not retry:
                    return _Verdict(
                        "needs too much memory to compile; make patterns and repetitions smaller",
                        "refused",
                        is_lasting=False,
                    )
            else:
                if status == _OK:
                    return _Verdict(None, "ok")
                if status == _REFUSED:
                    return _Verdict(text, "refused")
                return _Verdict("is too complex to be enforced; make patterns, repetitions and choices smaller", "refused")
        raise AssertionError("unreachable")

    def _remembered(self, tenant: str, digest: bytes) -> _Verdict | None:
        own = self._verdicts.get(tenant)
        if own is None or digest not in own:
            return None
        self._verdicts.move_to_end(tenant)
        own.move_to_end(digest)
        return own[digest]

    def _remember(self, tenant: str, digest: bytes, verdict: _Verdict) -> None:
        own = self._verdicts.setdefault(tenant, OrderedDict())
        self._verdicts.move_to_end(tenant)
        own[digest] = verdict
        if len(own) > self._settings.cache_entries:
            own.popitem(last=False)
        if len(self._verdicts) > self._settings.cache_tenants:
            self._verdicts.popitem(last=False)

    def _observe(self, seconds: float, outcome: str) -> None:
        if self._on_compiled is not None:
            self._on_compiled(seconds, outcome)
