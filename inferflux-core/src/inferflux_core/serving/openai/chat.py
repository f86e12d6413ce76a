"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.serving.body_reader import BodyReader
from inferflux_core.serving.event_stream import DONE
from inferflux_core.serving.generation import Delta, Done, Started
from inferflux_core.serving.guard import GuardedRoute, model_checked
from inferflux_core.serving.openai.answer import Answer
from inferflux_core.serving.openai.logprobs import chat_logprobs
from inferflux_core.serving.openai.respond import new_reply, respond
from inferflux_core.serving.openai.schemas import ChatBody
from inferflux_core.serving.openai.wire import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    WireUsage,
    encode,
)
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services

PATH = "/v1/chat/completions"


class ChatReply:
    """OpenAI's chat completion, whole or in chunks.

    Chunks of one request differ in a few bytes, so what they share is encoded once.
    """

    def __init__(self, *, n: int, include_usage: bool, with_logprobs: bool) -> None:
        self._n = n
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._id, self._created = new_reply("chatcmpl")
        self._head = b""
        self._before_text: list[bytes] = []
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._end

    def started(self, event: Started) -> bytes:
        """The role chunk of each choice, which tells clients that an answer begins."""
        self._head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,"choices":['
            % (encode(self._id), self._created, encode(event.model), encode(event.system_fingerprint))
        )
        self._before_text = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(self._n)]
        role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return b"".join(self._head + role % index + self._end for index in range(self._n))

    def delta(self, event: Delta) -> bytes:
        """A content chunk, and a last chunk of its own when the choice ends."""
        if event.finish_reason is None and event.text and event.tokens is None:
            return self._before_text[event.index] + encode(event.text) + self._after_text
        chunk = b""
        tokens = event.tokens if self._with_logprobs else None
        if event.text or tokens:
            logprobs = encode(chat_logprobs(tokens)) if tokens else b"null"
            text = self._before_text[event.index] + encode(event.text)
            chunk = text + b'},"logprobs":' + logprobs + b',"finish_reason":null}]' + self._end
        if event.finish_reason is not None:
            last = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}]'
            chunk += self._head + last % (event.index, encode(event.finish_reason)) + self._end
        return chunk

    def done(self, event: Done) -> bytes:
        """The usage chunk, if it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode(WireUsage.of(event.usage)) + b"}\n\n" + DONE

    def whole(self, answer: Answer) -> bytes:
        """The reply of a request that does not stream."""
        return encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=answer.started.model,
                system_fingerprint=answer.started.system_fingerprint,
                choices=[
                    ChatChoice(
                        index,
                        AssistantMessage(choice.text),
                        chat_logprobs(choice.tokens) if self._with_logprobs else None,
                        choice.finish_reason,
                    )
                    for index, choice in enumerate(answer.choices)
                ],
                usage=WireUsage.of(answer.usage),
            )
        )


def chat_routes(services: Services) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter(tags=["OpenAI"], route_class=GuardedRoute)
    server = services.settings.server
    reader = BodyReader(server)

    @router.post(PATH, **documented(ChatBody, ChatCompletion, streams=True))
    @model_checked
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        body = await reader.read(request, ChatBody)
        generation = body.generation(server.max_choices)
        reply = ChatReply(n=generation.n, include_usage=body.include_usage, with_logprobs=generation.logprobs is not None)
        return await respond(services, request, PATH, generation, reply, stream=bool(body.stream))

    return router
