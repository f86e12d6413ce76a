"""The outermost layer around every HTTP request: id, headers, log line, audit record, and the last word on errors."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferflux_core.access.services import AccessServices
from inferflux_core.errors import AccessUnavailableError
from inferflux_core.serving.audit_trail import audit_event
from inferflux_core.serving.client_address import TrustedProxies, client_address
from inferflux_core.serving.disconnect import ClientDisconnected
from inferflux_core.serving.error_responses import (
    error_body,
    error_reason,
    error_response,
    internal_error_body,
    json_response,
)
from inferflux_core.serving.exchange import Exchange, route_template
from inferflux_core.serving.hosts import HostCheck
from inferflux_core.serving.origins import OriginCheck, OriginGuard
from inferflux_core.serving.services import Services
from inferflux_core.telemetry.logging import frames_of, request_id_var

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("inferflux.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = frozenset({"/livez", "/readyz"})  # without a principal, every few seconds, and they tell nothing: not recorded
_QUIET_ROUTES = _PROBES | {"/healthz", "/metrics"}
CLIENT_CLOSED = 499


class _Reply:
    """Where the application sends its answer: the headers of every reply are added, and the answer ends only when its audit
    record is as safe as the configuration wants (`audit.fsync: each`).

    Attributes:
        begun: something of the answer was sent.
        refused: the record was not taken, so the answer must not end; None if it was.
    """

    def __init__(self, exchange: Exchange, scope: Scope, send: Send, access: AccessServices) -> None:
        self.begun = False
        self.refused: AccessUnavailableError | None = None
        self._exchange = exchange
        self._scope = scope
        self._send = send
        self._access = access
        self._head: Message | None = None
        self._missing = 0  # bytes of the body that are still to come, by Content-Length
        self._recorded = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the answer. Its head waits for the body, so that one that must not be given can be replaced."""
        if message["type"] == "http.response.start":
            self._head = message
            self._exchange.status = message["status"]
            return
        if self._head is not None:
            self._missing = _content_length(self._head)
        self._missing -= len(message.get("body", b""))
        if not message.get("more_body", False) or self._missing == 0:
            await self.record(self._exchange.status or CLIENT_CLOSED)
        if self._head is not None:
            head, self._head = self._head, None
            self._add_headers(head)
            self.begun = True
            await self._send(head)
        await self._send(message)

    def _add_headers(self, head: Message) -> None:
        exchange = self._exchange
        headers = MutableHeaders(scope=head)
        if exchange.context is not None:
            headers.update(exchange.context.reply_headers)
        headers["x-request-id"] = exchange.request_id
        headers["openai-processing-ms"] = str(int((time.monotonic() - exchange.arrival) * 1000))
        headers["openai-version"] = "2020-10-01"

    async def record(self, status: int) -> None:
        """Put the exchange on record, once. Raises AccessUnavailableError if it must not end unrecorded."""
        if self._recorded or route_template(self._scope) in _PROBES:
            return
        self._recorded = True
        exchange = self._exchange
        is_stranger = exchange.principal.method == "none" and not self._access.admission.open
        if is_stranger and not self._access.strangers.may_write(exchange.address):
            return
        event = audit_event(exchange, self._scope, status)
        try:
            await self._access.audit.record(event, important=exchange.auth_failure is not None)
        except AccessUnavailableError as error:
            self.refused = error
            raise


class RequestEnvelope:
    """ASGI middleware. Pure ASGI, because a stream passes through here chunk by chunk."""

    def __init__(self, app: ASGIApp, *, services: Services) -> None:
        server = services.settings.server
        self._app = OriginGuard(app, check=OriginCheck(server.allowed_origins, server.public_url))
        self._metrics = services.metrics
        self._access = services.access
        self._trusted_proxies = TrustedProxies(server.trusted_proxies)
        self._host_check = HostCheck(server.host, server.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but cancellation gets out of here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(Headers(scope=scope)))
        exchange.address, exchange.address_source = client_address(scope, self._trusted_proxies)
        exchange.attach(scope)
        token = request_id_var.set(exchange.request_id)

        reply = _Reply(exchange, scope, send, self._access)
        try:
            await self._answer(exchange, scope, receive, reply)
        finally:
            self._note(exchange, scope)
            try:
                with contextlib.suppress(AccessUnavailableError):  # nobody is left to tell
                    await reply.record(CLIENT_CLOSED)
            finally:
                request_id_var.reset(token)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: _Reply) -> None:
        try:
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            own_address = (scope.get("server") or (None,))[0]
            if problem := self._host_check.problem(hosts, http_version=scope["http_version"], address=own_address):
                status, message = problem
                exchange.error = "bad_host"
                headers = {"Connection": "close"} if status == 400 else None
                await json_response(error_body(message, status=status), status, headers)(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except ClientDisconnected:
            exchange.status = CLIENT_CLOSED
            self._metrics.disconnect()
        except Exception as error:
            if send.refused is not None:
                # Without its end the client sees that an answer broke off; one that has not begun can still say why.
                exchange.error = error_reason(send.refused)
                if not send.begun:
                    await error_response(send.refused)(scope, receive, send)
                return
            # The text of an unexpected exception may quote what a user wrote, so it stays out of log and reply.
            logger.error("unexpected %s\n%s", type(error).__qualname__, frames_of(error))
            exchange.error = "internal_error"
            if not send.begun:
                await json_response(internal_error_body(exchange.request_id), 500)(scope, receive, send)

    def _note(self, exchange: Exchange, scope: Scope) -> None:
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


def _content_length(head: Message) -> int:
    """Bytes that the body of an answer will have; -1 if it does not say."""
    return next((int(value) for name, value in head["headers"] if name == b"content-length"), -1)


def _request_id(headers: Headers) -> str:
    """The client's own id if it cannot be mistaken for anything else in a log, otherwise a new one."""
    inbound = headers.get("x-request-id", "")
    return inbound if _REQUEST_ID.fullmatch(inbound) else uuid.uuid4().hex
