"""Times one request of the pipeline for the metrics, however it ends."""

from __future__ import annotations

import time

from inferflux_core.engine.client import OutputStream
from inferflux_core.errors import RequestError
from inferflux_core.serving.generation import RequestContext
from inferflux_core.telemetry.metrics import Metrics


class Observer:
    """Times one request for the metrics, however it ends.

    Attributes:
        model: name of the one that answers.
        num_generated, num_reasoning, num_calls: tokens, those of thoughts among them, and calls begun, of all choices.
    """

    def __init__(self, context: RequestContext, model: str | None, metrics: Metrics) -> None:
        self.model = model or ""
        self.num_generated = 0
        self.num_reasoning = 0
        self.num_calls = 0
        self._context = context
        self._metrics = metrics
        self._first: float | None = None
        self._last = 0.0
        self._queue_time: float | None = None
        self._status = 499  # until it is known better: the client left
        self._finish_reason = "abort"

    def outputs_arrived(self, stream: OutputStream) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._queue_time = max(0.0, (stream.started_at or now) - self._context.arrival)
        else:
            self._metrics.inter_token(self.model, now - self._last)
        self._last = now

    def done(self, finish_reason: str) -> None:
        self._status = 200
        self._finish_reason = finish_reason

    def failed(self, error: RequestError) -> None:
        self._status = error.status
        self._finish_reason = "error"
        self._metrics.error(error.code or error.type)

    def closed(self) -> None:
        first = self._first
        self._metrics.request_finished(
            self._context.endpoint,
            self.model,
            self._status,
            self._finish_reason,
            duration=time.monotonic() - self._context.arrival,
            ttft=None if first is None else first - self._context.arrival,
            queue_time=self._queue_time,
            num_generated=self.num_generated,
            num_reasoning=self.num_reasoning,
            num_calls=self.num_calls,
            decode_time=None if first is None else self._last - first,
        )
