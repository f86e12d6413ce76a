"""`POST /tokenize`, `/detokenize` and `/apply-template`, in vLLM's and llama-server's shapes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Self

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.errors import ContextLengthExceededError, InvalidRequestError, ModelLoadingError
from inferflux_core.interfaces import Tokenizer
from inferflux_core.serving.body_reader import BodyReader
from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import ChatPrompt, Prompt, ReasoningOptions, ToolRequest
from inferflux_core.serving.guard import GuardedRoute, model_checked
from inferflux_core.serving.openai.fields import TokenId
from inferflux_core.serving.openai.messages import Message, to_chat_prompt
from inferflux_core.serving.openai.reasoning import TemplateKwargs
from inferflux_core.serving.openai.tools import Tool, Tools, tool_request
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.request_facts import MAX_BYTES_PER_TOKEN, prompt_size
from inferflux_core.serving.services import ModelView, Services

Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(None, description="Name or alias of a model; by default the server's default model.")


class TokenizeBody(_Body):
    """Body of `POST /tokenize`: exactly one of `prompt`, `messages` (vLLM) and `content` (llama-server).

    Attributes:
        add_special_tokens: vLLM's name; true by default for `prompt`, false for `messages`, whose template adds its own.
        add_special: llama-server's name; false by default.
        parse_special: read the texts of control tokens as these tokens; false by default for `prompt`, as /v1/completions
            reads it, true for `content`, as llama-server has it. Messages are read as /v1/chat/completions reads them.
        return_token_strs: vLLM: also return the text of each token.
        with_pieces: llama-server: return objects of id and text instead of ids.
    """

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = Field(None, description="What the model would be told of; with `messages` only.")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables of the chat template, with `messages`.")
    content: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("prompt", "messages", "content") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"Send exactly one of 'prompt', 'messages' and 'content'; this request has {len(given)} of them.",
                param=given[1] if given else "prompt",
            )
        for name in ("tools", "chat_template_kwargs"):
            if getattr(self, name) and self.messages is None:
                raise InvalidRequestError(f"{name!r} is only allowed with 'messages'; no other text is put there.", param=name)
        return self

    def text(self) -> tuple[Prompt, bool]:
        """What to tokenize, and whether the model's BOS and EOS go around it."""
        if self.messages is not None:
            return to_chat_prompt(self.messages, self.chat_template_kwargs), bool(self.add_special_tokens)
        if self.prompt is not None:
            return self.prompt, self.add_special_tokens is not False
        return self.content or "", bool(self.add_special)


class DetokenizeBody(_Body):
    """Body of `POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class TemplateBody(_Body):
    """Body of `POST /apply-template`."""

    messages: Messages
    tools: Tools | None = Field(None, description="What the model would be told of.")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables of the chat template.")


class TokenizeReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Reply to `prompt` and `messages`."""

    count: int
    max_model_len: int | None
    tokens: Sequence[int]
    token_strs: list[str] | None = None


class Piece(msgspec.Struct, frozen=True):
    """A token with its text, or with its bytes where these are no text of their own."""

    id: int
    piece: str | list[int]


class ContentReply(msgspec.Struct, frozen=True):
    """Reply to `content`."""

    tokens: Sequence[int | Piece]


class DetokenizeReply(msgspec.Struct, frozen=True):
    """The text twice: under vLLM's name and under llama-server's."""

    prompt: str
    content: str


class TemplateReply(msgspec.Struct, frozen=True):
    """What the model would read."""

    prompt: str


def token_routes(services: Services) -> APIRouter:
    """The routes that show how a model reads text."""
    router = APIRouter(tags=["Tokens"], route_class=GuardedRoute)
    models, admission, reader = services.models, services.access.admission, BodyReader(services.settings.server)

    @contextlib.asynccontextmanager
    async def using(request: Request, name: str | None) -> AsyncIterator[ModelView]:
        """The model, if this credential may see it; the request counts against the credential's quota."""
        exchange = Exchange.of(request.scope)
        view: ModelView = admission.see(exchange.principal, models, name, exchange.judged)
        exchange.model = view.name
        async with admission.counted(exchange.principal, view.name):
            yield view

    async def as_read(view: ModelView, prompt: ChatPrompt, tools: Sequence[Tool] | None) -> ChatPrompt:
        """The conversation as a generation would give it to the template."""
        request = tool_request(tools, None)
        _check_size(view, prompt, request)
        return await asyncio.to_thread(models.chat_prompt, view, prompt, request, ReasoningOptions())

    @router.post("/tokenize", **documented(TokenizeBody, TokenizeReply, ContentReply))
    @model_checked
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        body = await reader.read(request, TokenizeBody)
        text, add_special = body.text()
        parse_special = body.content is not None if body.parse_special is None else body.parse_special
        async with using(request, body.model) as view:
            if isinstance(text, ChatPrompt):
                text = await as_read(view, text, body.tools)
            else:
                _check_size(view, text)
            tokens = await models.tokenize(view, text, add_special, parse_special)
            if body.content is None:
                texts = await asyncio.to_thread(_texts, _tokenizer(view), tokens) if body.return_token_strs else None
                return json_response(encode(TokenizeReply(len(tokens), view.max_model_len, tokens, texts)))
            if body.with_pieces:
                return json_response(encode(ContentReply(await asyncio.to_thread(_pieces, _tokenizer(view), tokens))))
        return json_response(encode(ContentReply(tokens)))

    @router.post("/detokenize", **documented(DetokenizeBody, DetokenizeReply))
    @model_checked
    async def detokenize(request: Request) -> Response:
        """The text of token ids, control tokens included; invalid UTF-8 becomes U+FFFD."""
        body = await reader.read(request, DetokenizeBody)
        async with using(request, body.model) as view:
            text = await asyncio.to_thread(_decode, _tokenizer(view), body.tokens)
        return json_response(encode(DetokenizeReply(text, text)))

    @router.post("/apply-template", **documented(TemplateBody, TemplateReply))
    @model_checked
    async def apply_template(request: Request) -> Response:
        """The text that the model's chat template makes of a conversation."""
        body = await reader.read(request, TemplateBody)
        async with using(request, body.model) as view:
            prompt = await as_read(view, to_chat_prompt(body.messages, body.chat_template_kwargs), body.tools)
            text = await asyncio.to_thread(models.render_chat, view, prompt)
        return json_response(encode(TemplateReply(text)))

    return router


def _check_size(view: ModelView, prompt: Prompt, tools: ToolRequest | None = None) -> None:
    """Refuse what no context holds, as a generation would: tokens take several times the room of their text."""
    if view.max_model_len is not None and (size := prompt_size(prompt, tools)) > view.max_model_len * MAX_BYTES_PER_TOKEN:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {view.max_model_len} tokens. Your input of {size} characters is longer "
            f"than that in any wording. Please send it in parts.",
            param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
        )


def _tokenizer(view: ModelView) -> Tokenizer:
    if view.tokenizer is None:
        raise ModelLoadingError(
            f"The tokenizer of model {view.name!r} is not loaded, because the model is {view.state}; try again later.",
            param="model",
        )
    return view.tokenizer


def _texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    return [tokenizer.token_bytes(token, special=True).decode("utf-8", "replace") for token in tokens]


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for token in tokens:
        data = tokenizer.token_bytes(token, special=True)
        try:
            pieces.append(Piece(token, data.decode("utf-8")))
        except UnicodeDecodeError:
            pieces.append(Piece(token, list(data)))
    return pieces


def _decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Decode, refusing ids beyond the vocabulary: native code is never asked about them."""
    size: Any = tokenizer.vocab_size
    for index, token in enumerate(tokens):
        if token >= size:
            raise InvalidRequestError(
                f"Invalid value for 'tokens[{index}]': {token} is not in the vocabulary; ids go from 0 to {size - 1}.",
                param=f"tokens[{index}]",
            )
    return tokenizer.decode(tokens, special=True)
