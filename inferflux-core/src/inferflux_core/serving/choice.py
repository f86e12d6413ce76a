"""One choice of an answer on its way from tokens to what clients see."""

from __future__ import annotations

from inferflux_core.engine.types import EngineOutput, FinishReason, TokenLogprobs
from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.output_parser import OutputParser, Parsed
from inferflux_core.serving.generation import Delta, TokenEntry, TokenText

TOOL_CALLS = "tool_calls"
"""Finish reason of a choice that ended with whole calls: OpenAI's."""


class Choice:
    """One choice: the parser of its text and what it has generated.

    Args:
        shows_thoughts: whether the client wants to see them.

    Attributes:
        finish_reason: OpenAI's `stop`, `length` or `tool_calls`; None while it has not ended.
    """

    __slots__ = (
        "_num_calls",
        "_num_incomplete",
        "_parser",
        "_shows_thoughts",
        "finish_reason",
        "index",
        "num_cached",
        "num_generated",
        "request_id",
        "tokenizer",
    )

    def __init__(
        self, index: int, request_id: str, tokenizer: Tokenizer, parser: OutputParser, *, shows_thoughts: bool = True
    ) -> None:
        self.index = index
        self.request_id = request_id
        self.finish_reason: str | None = None
        self.num_generated = 0
        self.num_cached = 0
        self.tokenizer = tokenizer
        self._parser = parser
        self._shows_thoughts = shows_thoughts
        self._num_calls = 0
        self._num_incomplete = 0

    @property
    def num_reasoning(self) -> int:
        """Tokens of thoughts so far."""
        return self._parser.num_reasoning_tokens

    def take(self, output: EngineOutput) -> Delta:
        """What an engine output brings; with a finish reason, also when a stop string or a call ended the choice."""
        parser = self._parser
        parsed = parser.push(output.token_ids)
        self.num_generated = output.num_generated
        self.num_cached = output.num_cached_tokens
        if parser.stopped or parser.ended_by_call:
            self._end(FinishReason.STOP, parsed)
        elif output.finish_reason is not None:
            rest = parser.finish()
            parsed = Parsed(parsed.text + rest.text, parsed.reasoning + rest.reasoning, parsed.calls + rest.calls)
            self._end(FinishReason.STOP if parser.stopped else output.finish_reason, parsed)
        elif parsed.calls:
            self._count(parsed)
        tokens = None
        if output.logprobs is not None:
            tokens = [self._entry(t, lp) for t, lp in zip(output.token_ids, output.logprobs, strict=True)]
        reasoning = parsed.reasoning if self._shows_thoughts else ""
        return Delta(self.index, parsed.text, tokens, self.finish_reason, reasoning, parsed.calls)

    def _end(self, reason: FinishReason, parsed: Parsed) -> None:
        self._count(parsed)
        called = reason is FinishReason.STOP and self._num_calls > self._num_incomplete
        self.finish_reason = TOOL_CALLS if called else reason

    def _count(self, parsed: Parsed) -> None:
        for piece in parsed.calls:
            self._num_calls += bool(piece.name)
            self._num_incomplete += piece.incomplete

    def _entry(self, token: int, logprobs: TokenLogprobs) -> TokenEntry:
        return TokenEntry(self._text(token, logprobs.logprob), [self._text(other, logprob) for other, logprob in logprobs.top])

    def _text(self, token: int, logprob: float) -> TokenText:
        data = self.tokenizer.token_bytes(token, special=True)
        return TokenText(data.decode("utf-8", "replace"), data, logprob)


def joined(earlier: Delta, later: Delta) -> bool:
    """Add a delta to the one before it; False if that would change the order of what clients see."""
    if (earlier.calls and (later.text or later.reasoning)) or (earlier.text and later.reasoning):
        return False
    earlier.text += later.text
    earlier.reasoning += later.reasoning
    earlier.calls += later.calls
    earlier.finish_reason = later.finish_reason
    if later.tokens is not None:
        earlier.tokens = (earlier.tokens or []) + later.tokens
    return True
