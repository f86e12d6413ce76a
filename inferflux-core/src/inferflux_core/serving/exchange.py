"""One HTTP exchange: what is known about a request while it is answered, for its log line and its metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from inferflux_core.serving.generation import Usage

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
    """

    request_id: str
    arrival: float = field(default_factory=time.monotonic)
    status: int | None = None
    error: str | None = None
    in_pipeline: bool = False
    model: str | None = None
    usage: Usage | None = None

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
