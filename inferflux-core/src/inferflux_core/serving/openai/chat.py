"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.serving.body_reader import BodyReader
from inferflux_core.serving.guard import GuardedRoute, model_checked
from inferflux_core.serving.openai.chat_reply import ChatReply
from inferflux_core.serving.openai.respond import respond
from inferflux_core.serving.openai.schemas import ChatBody
from inferflux_core.serving.openai.wire import ChatCompletion
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services

PATH = "/v1/chat/completions"


def chat_routes(services: Services) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter(tags=["OpenAI"], route_class=GuardedRoute)
    server = services.settings.server
    reader = BodyReader(server)

    @router.post(PATH, **documented(ChatBody, ChatCompletion, streams=True))
    @model_checked
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, with text, calls of tools or both; with `stream`, as server-sent events."""
        body, generation = await reader.read_as(request, ChatBody, lambda body: body.generation(server))
        reply = ChatReply(
            n=generation.n,
            include_usage=body.include_usage,
            with_logprobs=generation.logprobs is not None,
            reasoning_field=server.reasoning_field,
            uses_functions=body.uses_functions,
        )
        return await respond(services, request, PATH, generation, reply, stream=bool(body.stream))

    return router
