"""What the audit log says of one HTTP exchange: one record, named after what became of it."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import Scope

from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.serving.exchange import UNMATCHED, Exchange, route_template

_MAX_PATH = 128
_REFUSED = (401, 403, 404, 429)


def audit_event(exchange: Exchange, scope: Scope, status: int) -> AuditEvent:
    """The record of an exchange that is about to end, or has ended, with a status.

    `auth.failed` for a credential that was refused, `policy.denied` for a permission that was, `request.completed` for
    everything else, whatever its status. A running answer whose client left has status 499.
    """
    fields: dict[str, Any] = {
        "api": route_template(scope),
        "method": scope["method"],
        "status": status,
        "latency_ms": int((time.monotonic() - exchange.arrival) * 1000),
        "auth_method": exchange.principal.method,
        "address_source": exchange.address_source,
        "ended_by": _ended_by(exchange, status),
    }
    if fields["api"] == UNMATCHED:
        fields["path"] = scope["path"][:_MAX_PATH]
    name = "request.completed"
    if exchange.auth_failure is not None:
        name = "auth.failed"
        fields["reason"] = exchange.auth_failure
    elif exchange.judged:
        last = exchange.judged[-1]
        if not last.decision.allowed and status in _REFUSED:
            name = "policy.denied"
        fields["decision"] = {
            "effect": "allow" if last.decision.allowed else "deny",
            "engine": last.decision.engine,
            "rule": last.decision.rule,
            "version": last.decision.version,
            "object": last.obj,
            "action": last.action,
        }
    if exchange.error is not None:
        fields["error"] = exchange.error
    if exchange.context is not None:
        outcome = exchange.context.outcome
        fields |= {
            "model_requested": outcome.requested_model,
            "model": outcome.model,
            "model_digest": outcome.fingerprint,
            "tokens_in": outcome.prompt_tokens,
            "tokens_out": outcome.output_tokens,
            "tokens_cached": outcome.cached_tokens,
            "finish_reason": outcome.finish_reason,
            "parameters": outcome.parameters,
            "stream": outcome.stream,
            **outcome.content,
        }
    elif exchange.model is not None:
        fields["model"] = exchange.model
    return AuditEvent(
        event=name,
        request_id=exchange.request_id,
        principal=exchange.principal,
        address=exchange.address,
        fields=fields,
    )


def _ended_by(exchange: Exchange, status: int) -> str:
    if exchange.error == "slow_reader":
        return "slow_reader"
    if status == 499:
        return "client"
    return "limit" if status == 429 else "server"
