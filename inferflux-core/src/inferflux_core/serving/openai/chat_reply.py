"""OpenAI's chat completion out of pipeline events, whole or in chunks."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from inferflux_core.serving.event_stream import DONE
from inferflux_core.serving.generation import CallDelta, Delta, Done, Started, TokenEntry
from inferflux_core.serving.openai.answer import Answer, Call, Choice
from inferflux_core.serving.openai.logprobs import chat_logprobs
from inferflux_core.serving.openai.respond import new_reply
from inferflux_core.serving.openai.wire import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ToolCall,
    WireUsage,
    encode,
)


class ChatReply:
    """The reply to one request, whole or in chunks.

    Chunks of one request differ in a few bytes, so what they share is encoded once. Log-probabilities are those of all tokens
    drawn, thoughts and calls included; they ride on the first chunk of what the same step brought.

    Args:
        reasoning_field: under which names thoughts are told.
        uses_functions: calls are told as OpenAI's older `function_call`.
    """

    def __init__(
        self,
        *,
        n: int,
        include_usage: bool,
        with_logprobs: bool,
        reasoning_field: Literal["both", "reasoning_content", "reasoning", "none"] = "both",
        uses_functions: bool = False,
    ) -> None:
        self._n = n
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._uses_functions = uses_functions
        names = ("reasoning_content", "reasoning") if reasoning_field == "both" else (reasoning_field,)
        self._reasoning_names = () if reasoning_field == "none" else names
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
        """A content chunk; chunks of thoughts and calls; and a last chunk of its own when the choice ends."""
        plain = event.finish_reason is None and event.tokens is None and not event.calls and not event.reasoning
        if plain and event.text:
            return self._before_text[event.index] + encode(event.text) + self._after_text
        tokens = event.tokens if self._with_logprobs else None
        deltas = self._deltas(event)
        if tokens and not deltas:
            deltas = [b'"content":""']
        chunks = []
        for delta in deltas:
            logprobs = encode(chat_logprobs(tokens)) if tokens else b"null"
            tokens = None
            chunk = b'{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":null}]' % (event.index, delta, logprobs)
            chunks.append(self._head + chunk + self._end)
        if event.finish_reason is not None:
            last = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}]'
            chunks.append(self._head + last % (event.index, encode(self._reason(event.finish_reason))) + self._end)
        return b"".join(chunks)

    def _deltas(self, event: Delta) -> list[bytes]:
        """The members of the `delta` objects that an event makes."""
        deltas = []
        if event.reasoning and self._reasoning_names:
            text = encode(event.reasoning)
            deltas.append(b",".join(b'"%b":%b' % (name.encode(), text) for name in self._reasoning_names))
        if event.text:
            deltas.append(b'"content":' + encode(event.text))
        for piece in event.calls:
            deltas += self._function_pieces(piece) if self._uses_functions else self._tool_pieces(piece)
        return deltas

    @staticmethod
    def _tool_pieces(piece: CallDelta) -> list[bytes]:
        """First the name with empty arguments, as OpenAI begins each call; then arguments."""
        deltas = []
        if piece.name:
            first = b'"tool_calls":[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""}}]'
            deltas.append(first % (piece.index, encode(piece.id), encode(piece.name)))
        if piece.arguments or piece.incomplete:
            status = b',"status":"incomplete"' if piece.incomplete else b""
            more = b'"tool_calls":[{"index":%d,"function":{"arguments":%b}%b}]'
            deltas.append(more % (piece.index, encode(piece.arguments), status))
        return deltas

    @staticmethod
    def _function_pieces(piece: CallDelta) -> list[bytes]:
        deltas = []
        if piece.name:
            deltas.append(b'"function_call":{"name":%b,"arguments":""}' % encode(piece.name))
        if piece.arguments or piece.incomplete:
            status = b',"status":"incomplete"' if piece.incomplete else b""
            deltas.append(b'"function_call":{"arguments":%b%b}' % (encode(piece.arguments), status))
        return deltas

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
                    ChatChoice(index, self._message(choice), self._logprobs(choice.tokens), self._reason(choice.finish_reason))
                    for index, choice in enumerate(answer.choices)
                ],
                usage=WireUsage.of(answer.usage),
            )
        )

    def _message(self, choice: Choice) -> AssistantMessage:
        text, calls, thoughts = choice.text, choice.calls, choice.reasoning
        names = self._reasoning_names if thoughts else ()
        return AssistantMessage(
            content=text if text or not calls else None,
            tool_calls=[_tool_call(call) for call in calls] if calls and not self._uses_functions else UNSET,
            function_call=_called(calls[0], _status(calls[0])) if calls and self._uses_functions else UNSET,
            reasoning_content=thoughts if "reasoning_content" in names else UNSET,
            reasoning=thoughts if "reasoning" in names else UNSET,
        )

    def _logprobs(self, tokens: list[TokenEntry]) -> ChatLogprobs | None:
        return chat_logprobs(tokens) if self._with_logprobs else None

    def _reason(self, finish_reason: str) -> str:
        return "function_call" if self._uses_functions and finish_reason == "tool_calls" else finish_reason


def _tool_call(call: Call) -> ToolCall:
    return ToolCall(call.id, "function", _called(call), _status(call))


def _called(call: Call, status: Literal["incomplete"] | UnsetType = UNSET) -> CalledFunction:
    return CalledFunction(call.name, call.arguments, status)


def _status(call: Call) -> Literal["incomplete"] | UnsetType:
    return "incomplete" if call.incomplete else UNSET
