"""One HTTP exchange: what is known about a request while it is answered, for its log line, metrics and audit record."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from inferflux_core.access.admission import Admission, Judged
from inferflux_core.identity import Action, Principal
from inferflux_core.serving.generation import RequestContext, Usage

_SCOPE_KEY = "inferflux.exchange"
UNMATCHED = "unmatched"


@dataclass(slots=True)
class Exchange:
    """Rides in the ASGI scope from the outermost middleware to the adapter and back.

    Attributes:
        request_id: the client's `x-request-id` if it is well formed, else a new one.
        arrival: `time.monotonic()` when the head of the request was read.
        status: HTTP status sent, 499 if the client left first; None before the head of the reply.
        error: reason of a failure: an error code, or the error type where there is no code.
        in_pipeline: the pipeline took over; it counts this request in the metrics itself.
        model: canonical name of the model that answers.
        usage: token counts, once they are known.
        address: of the client; behind trusted proxies its own.
        address_source: how it is known, `peer` or `forwarded`.
        principal: who asks; anonymous until the gate has found out.
        judged: the decisions made about this request.
        auth_failure: why the credential was refused; never sent.
        context: what the pipeline was given, if the request came so far.
    """

    request_id: str
    arrival: float = field(default_factory=time.monotonic)
    status: int | None = None
    error: str | None = None
    in_pipeline: bool = False
    model: str | None = None
    usage: Usage | None = None
    address: str | None = None
    address_source: str = "peer"
    principal: Principal = field(default_factory=Principal)
    admission: Admission | None = None
    judged: list[Judged] = field(default_factory=list)
    auth_failure: str | None = None
    context: RequestContext | None = None

    def authorize(self, obj: str, action: Action) -> None:
        """Raises ForbiddenError unless the principal may do this."""
        assert self.admission is not None, "no gate in front of this route"
        self.admission.authorize(self.principal, obj, action, self.judged)

    def begin_generation(self, endpoint: str, timeout_s: float) -> RequestContext:
        """The context of the one request that this exchange makes to the pipeline."""
        self.context = RequestContext(
            endpoint=endpoint,
            deadline=self.arrival + timeout_s,
            request_id=self.request_id,
            arrival=self.arrival,
            principal=self.principal,
            judged=self.judged,
        )
        return self.context

    def attach(self, scope: Scope) -> None:
        """Put this exchange into the scope of its request."""
        scope[_SCOPE_KEY] = self

    @staticmethod
    def of(scope: Scope) -> Exchange:
        """The exchange of a request that came through `RequestEnvelope`."""
        exchange = scope[_SCOPE_KEY]
        assert isinstance(exchange, Exchange)
        return exchange


def route_template(scope: Scope) -> str:
    """The path template of the route that matched, e.g. `/v1/models/{model_id}`; a label of bounded cardinality."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED
