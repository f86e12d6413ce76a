"""The outermost layer around every HTTP request: id, headers, log line, and the last word on errors."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferflux_core.serving.disconnect import ClientDisconnected
from inferflux_core.serving.error_responses import error_body, internal_error_body, json_response
from inferflux_core.serving.exchange import Exchange, route_template
from inferflux_core.serving.hosts import HostCheck
from inferflux_core.telemetry.logging import frames_of, request_id_var
from inferflux_core.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("inferflux.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
CLIENT_CLOSED = 499


class RequestEnvelope:
    """ASGI middleware. Pure ASGI, because a stream passes through here chunk by chunk."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, host_check: HostCheck) -> None:
        self._app = app
        self._metrics = metrics
        self._host_check = host_check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but cancellation gets out of here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(Headers(scope=scope)))
        exchange.attach(scope)
        token = request_id_var.set(exchange.request_id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = exchange.request_id
                headers["openai-processing-ms"] = str(int((time.monotonic() - exchange.arrival) * 1000))
                headers["openai-version"] = "2020-10-01"
            await send(message)

        try:
            await self._answer(exchange, scope, receive, send_with_headers)
        finally:
            self._record(exchange, scope)
            request_id_var.reset(token)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            if problem := self._host_check.problem(hosts):
                status, message = problem
                exchange.error = "bad_host"
                await json_response(error_body(message, status=status), status)(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except ClientDisconnected:
            exchange.status = CLIENT_CLOSED
            self._metrics.disconnect()
        except Exception as error:
            # The text of an unexpected exception may quote what a user wrote, so it stays out of log and reply.
            logger.error("unexpected %s\n%s", type(error).__qualname__, frames_of(error))
            exchange.error = "internal_error"
            if exchange.status is None:
                await json_response(internal_error_body(exchange.request_id), 500)(scope, receive, send)

    def _record(self, exchange: Exchange, scope: Scope) -> None:
        route = route_template(scope)
        status = exchange.status if exchange.status is not None else CLIENT_CLOSED
        if exchange.error is not None and not exchange.in_pipeline:
            self._metrics.request_refused(route, status, exchange.error)
        level = logging.DEBUG if route in _QUIET_ROUTES and status != 500 else logging.INFO
        if not access_logger.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round((time.monotonic() - exchange.arrival) * 1000, 1),
        }
        if exchange.model is not None:
            fields["model"] = exchange.model
        if exchange.usage is not None:
            fields["prompt_tokens"] = exchange.usage.prompt_tokens
            fields["completion_tokens"] = exchange.usage.completion_tokens
        if exchange.error is not None:
            fields["error"] = exchange.error
        access_logger.log(level, "request", extra={"fields": fields})


def _request_id(headers: Headers) -> str:
    """The client's own id if it cannot be mistaken for anything else in a log, otherwise a new one."""
    inbound = headers.get("x-request-id", "")
    return inbound if _REQUEST_ID.fullmatch(inbound) else uuid.uuid4().hex
