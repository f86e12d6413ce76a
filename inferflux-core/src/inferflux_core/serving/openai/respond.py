"""One generation request of the OpenAI adapters, from the validated body to the response, streamed or whole."""

from __future__ import annotations

import time
import uuid
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.serving.disconnect import while_connected
from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.event_stream import ChunkFormat, EventStream
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import GenerationRequest
from inferflux_core.serving.openai.answer import Answer, collect
from inferflux_core.serving.services import Services


class ReplyFormat(ChunkFormat, Protocol):
    """A wire format that has a whole reply beside its chunks."""

    def whole(self, answer: Answer) -> bytes:
        """The reply of a request that does not stream."""


async def respond(
    services: Services,
    request: Request,
    endpoint: str,
    generation: GenerationRequest,
    reply: ReplyFormat,
    *,
    stream: bool,
) -> Response:
    """Send a request down the pipeline and answer it; a client that leaves ends it at once.

    Args:
        endpoint: route template, a metrics label.
        reply: makes the bytes; used for this request only.

    Raises:
        RequestError: the pipeline refused the request.
        ClientDisconnected: the client left before the answer was complete.
    """
    exchange = Exchange.of(request.scope)
    context = exchange.begin_generation(endpoint, services.settings.server.request_timeout_s)
    context.outcome.stream = stream
    exchange.in_pipeline = True
    events = services.pipeline.generate(context, generation)
    if stream:
        return EventStream(events, reply, exchange=exchange, settings=services.settings.server, metrics=services.metrics)
    num_choices = len(generation.prompts) * generation.n
    answer = await while_connected(request.receive, collect(events, num_choices, exchange))
    return json_response(reply.whole(answer))


def new_reply(prefix: str) -> tuple[str, int]:
    """An id nobody can guess or collide with, and the Unix time in seconds: `id` and `created` of a reply."""
    return f"{prefix}-{uuid.uuid4().hex}", int(time.time())
