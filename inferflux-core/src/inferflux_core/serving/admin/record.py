"""Every change by an administrator is in the audit log before its answer is sent."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.services import Services


async def record(services: Services, request: Request, event: str, **fields: Any) -> None:
    """Record who changed what. Returns when the log has it.

    Args:
        fields: what changed; JSON without floating-point numbers, never a secret.

    Raises:
        AccessUnavailableError: the log cannot take it; the change has been made all the same.
    """
    exchange = Exchange.of(request.scope)
    await services.access.audit.record(
        AuditEvent(
            event=event,
            request_id=exchange.request_id,
            principal=exchange.principal,
            address=exchange.address,
            fields=fields,
        ),
        important=True,
    )
