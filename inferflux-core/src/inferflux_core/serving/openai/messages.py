"""Chat messages as OpenAI's clients send them, and as chat templates expect them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from inferflux_core.errors import InvalidRequestError
from inferflux_core.serving.generation import ChatPrompt
from inferflux_core.serving.json_body import num_values, parse_object

MAX_ARGUMENTS_DEPTH = 64
MAX_ARGUMENT_VALUES = 100_000  # of all calls of a request together: each is parsed by itself, and printed by the template
MAX_TOOL_CALLS = 1024  # of one message

# OpenAI renamed them; templates were written for one of the names and drop what they do not know.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(BaseModel):
    """One part of a message's content. Only text has a meaning to a text model."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def words(self) -> str | None:
        """What the part says; None if it is not text."""
        return {"text": self.text, "refusal": self.refusal}.get(self.type)


class FunctionCall(BaseModel):
    """What a function was called with.

    Attributes:
        arguments: JSON text, as the model wrote it.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A call that the assistant made in an earlier turn."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _content_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[Part], Field(min_length=1, fail_fast=True), Tag("#parts")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="it should be a string or an array of content parts",
    ),
]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Role
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None

    @property
    def calls(self) -> list[ToolCall]:
        """The calls under both names that OpenAI gave them."""
        function = [] if self.function_call is None else [ToolCall(function=self.function_call)]
        return [*(self.tool_calls or ()), *function]

    @property
    def may_be_silent(self) -> bool:
        """Whether the message says something without content."""
        others = (self.refusal, self.reasoning_content, self.reasoning)
        return self.role == "assistant" and bool(self.calls or any(other is not None for other in others))


def to_chat_prompt(messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None) -> ChatPrompt:
    """The messages as chat templates know them: plain strings, `system` for `developer`, arguments as objects.

    Args:
        template_kwargs: variables that the request sets for the template.

    Raises:
        InvalidRequestError: with code `unsupported_value`, a content part is not text; with code `invalid_json`, the
            arguments of all tool calls together have too many values.
    """
    texts = (call.function.arguments.encode() for message in messages for call in message.calls)
    if sum(map(num_values, texts)) > MAX_ARGUMENT_VALUES:
        raise InvalidRequestError(
            f"The arguments of the tool calls have too many values: at most {MAX_ARGUMENT_VALUES} in all messages together are "
            f"read; send fewer messages.",
            param="messages",
            code="invalid_json",
        )
    templated = [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return ChatPrompt(templated, template_kwargs=template_kwargs or {})


def _template_message(message: Message, path: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "role": _TEMPLATE_ROLES.get(message.role, message.role),
        "content": _flatten(message, path),
    }
    if calls := message.calls:
        result["tool_calls"] = [_template_call(call) for call in calls]
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": reasoning}
    result.update((key, value) for key, value in optional.items() if value is not None)
    return result


def _flatten(message: Message, path: str) -> str:
    """Text parts joined by line ends, as vLLM and llama-server do."""
    if message.content is None:
        if message.may_be_silent:
            return message.refusal or ""
        rule = " unless it calls a tool" if message.role == "assistant" else ""
        raise InvalidRequestError(
            f"Missing required parameter: '{path}.content'; a message of role {message.role!r} needs it{rule}.",
            param=f"{path}.content",
        )
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        if part.words is None:
            param = f"{path}.content[{index}]"
            if part.type in ("text", "refusal"):
                raise InvalidRequestError(f"Missing required parameter: '{param}.{part.type}'.", param=f"{param}.{part.type}")
            raise InvalidRequestError(
                f"Invalid value for '{param}.type': {part.type[:40]!r} parts are not supported, because no model here reads "
                "anything but text; send parts of type 'text'.",
                param=f"{param}.type",
                code="unsupported_value",
            )
        texts.append(part.words)
    return "\n".join(texts)


def _template_call(call: ToolCall) -> dict[str, Any]:
    """Templates print arguments as JSON themselves, so they want the object; text that is none stays text."""
    arguments: Any = call.function.arguments
    with contextlib.suppress(InvalidRequestError):
        arguments = parse_object(call.function.arguments.encode() or b"{}", MAX_ARGUMENTS_DEPTH)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
