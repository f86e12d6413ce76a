"""`POST /v1/completions`: text continues text. `object` is `text_completion`, streamed or not."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.serving.body_reader import BodyReader
from inferflux_core.serving.event_stream import DONE
from inferflux_core.serving.generation import Delta, Done, Started, TokenEntry
from inferflux_core.serving.guard import GuardedRoute, model_checked
from inferflux_core.serving.openai.answer import Answer, Choice
from inferflux_core.serving.openai.logprobs import completion_logprobs
from inferflux_core.serving.openai.respond import new_reply, respond
from inferflux_core.serving.openai.schemas import CompletionBody
from inferflux_core.serving.openai.wire import Completion, CompletionChoice, CompletionLogprobs, WireUsage, encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services

PATH = "/v1/completions"


class CompletionReply:
    """OpenAI's text completion, whole or in chunks of the same shape.

    Choice index = prompt index * n + choice of that prompt; with `echo` each choice begins with its prompt's text.
    """

    def __init__(self, *, num_prompts: int, n: int, echo: bool, include_usage: bool, with_logprobs: bool) -> None:
        self._n = n
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._id, self._created = new_reply("cmpl")
        self._offsets = [0] * (num_prompts * n)
        self._head = b""
        self._before_text: list[bytes] = []
        self._after_text = b',"logprobs":null,"finish_reason":null}]' + self._end

    def started(self, event: Started) -> bytes:
        """With `echo` the prompts; otherwise nothing."""
        self._head = (
            b'data: {"id":%b,"object":"text_completion","created":%d,"model":%b,"system_fingerprint":%b,"choices":['
            % (encode(self._id), self._created, encode(event.model), encode(event.system_fingerprint))
        )
        indices = range(len(self._offsets))
        self._before_text = [self._head + b'{"index":%d,"text":' % index for index in indices]
        if not self._echo:
            return b""
        texts = event.prompt_texts
        return b"".join(self._before_text[i] + encode(texts[i // self._n]) + self._after_text for i in indices)

    def delta(self, event: Delta) -> bytes:
        """A chunk of text; the last one of a choice also says why it ended."""
        if event.finish_reason is None and event.tokens is None:
            return self._before_text[event.index] + encode(event.text) + self._after_text if event.text else b""
        tokens = event.tokens if self._with_logprobs else None
        if not event.text and not tokens and event.finish_reason is None:
            return b""
        logprobs = encode(self._logprobs(event.index, tokens)) if tokens else b"null"
        reason = b"null" if event.finish_reason is None else encode(event.finish_reason)
        text = self._before_text[event.index] + encode(event.text)
        return text + b',"logprobs":' + logprobs + b',"finish_reason":' + reason + b"}]" + self._end

    def done(self, event: Done) -> bytes:
        """The usage chunk, if it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode(WireUsage.of(event.usage)) + b"}\n\n" + DONE

    def whole(self, answer: Answer) -> bytes:
        """The reply of a request that does not stream."""
        return encode(
            Completion(
                id=self._id,
                created=self._created,
                model=answer.started.model,
                system_fingerprint=answer.started.system_fingerprint,
                choices=[self._choice(index, choice, answer) for index, choice in enumerate(answer.choices)],
                usage=WireUsage.of(answer.usage),
            )
        )

    def _choice(self, index: int, choice: Choice, answer: Answer) -> CompletionChoice:
        prompt = answer.started.prompt_texts[index // self._n] if self._echo else ""
        logprobs = self._logprobs(index, choice.tokens) if self._with_logprobs else None
        return CompletionChoice(index, prompt + choice.text, logprobs, choice.finish_reason)

    def _logprobs(self, index: int, tokens: list[TokenEntry]) -> CompletionLogprobs:
        logprobs, self._offsets[index] = completion_logprobs(tokens, self._offsets[index])
        return logprobs


def completion_routes(services: Services) -> APIRouter:
    """The route of text completions."""
    router = APIRouter(tags=["OpenAI"], route_class=GuardedRoute)
    server = services.settings.server
    reader = BodyReader(server)

    @router.post(PATH, **documented(CompletionBody, Completion, streams=True))
    @model_checked
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts; with `stream`, as server-sent events."""
        body, generation = await reader.read_as(request, CompletionBody, lambda body: body.generation(server))
        reply = CompletionReply(
            num_prompts=len(generation.prompts),
            n=generation.n,
            echo=bool(body.echo),
            include_usage=body.include_usage,
            with_logprobs=generation.logprobs is not None,
        )
        return await respond(services, request, PATH, generation, reply, stream=bool(body.stream))

    return router
