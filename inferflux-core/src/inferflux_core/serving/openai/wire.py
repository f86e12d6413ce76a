"""OpenAI's reply objects, in the order of keys in which OpenAI sends them. Encoded with msgspec."""

from __future__ import annotations

from typing import Literal

import msgspec

from inferflux_core.serving.generation import Usage

encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """How many of the completion's tokens were reasoning."""

    reasoning_tokens: int


class WireUsage(msgspec.Struct, frozen=True):
    """`usage` of chat and text completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> WireUsage:
        """The pipeline's counts in OpenAI's shape."""
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens + usage.completion_tokens,
            PromptTokensDetails(usage.cached_tokens),
            CompletionTokensDetails(usage.reasoning_tokens),
        )


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token drawn at a position, and its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """A function and the JSON text of its arguments.

    Attributes:
        status: `incomplete` if the answer ended within the arguments; absent otherwise.
    """

    name: str
    arguments: str
    status: Literal["incomplete"] | msgspec.UnsetType = msgspec.UNSET


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool. `status` as in `CalledFunction`."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    status: Literal["incomplete"] | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer of one chat choice.

    Attributes:
        content: None if only tools were called.
        tool_calls: absent if none were called.
        function_call: the call of a request that used OpenAI's older `functions`.
        reasoning_content, reasoning: the model's thoughts, under the names that `server.reasoning_field` chose.
    """

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: CalledFunction | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to the messages."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: WireUsage


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """`logprobs` of a text choice: parallel lists, one entry a token; offsets are in characters of the generated text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: WireUsage


class ModelExtras(msgspec.Struct, frozen=True):
    """What InferFlux says about a model beyond OpenAI's fields."""

    backend: str
    max_model_len: int | None
    aliases: tuple[str, ...]
    default: bool
    state: str
    details: dict[str, str]


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of `GET /v1/models/{id}`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["inferflux"] = "inferflux"
    inferflux: ModelExtras


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
