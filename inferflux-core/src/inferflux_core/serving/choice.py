"""One choice of an answer on its way from tokens to what clients see."""

from __future__ import annotations

from collections.abc import Sequence

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
        tags: what they stand between where the client wants them in the text; None tells them apart from it.

    Attributes:
        finish_reason: OpenAI's `stop`, `length` or `tool_calls`; None while it has not ended.
        num_calls: calls begun.
    """

    __slots__ = (
        "_in_tags",
        "_num_incomplete",
        "_parser",
        "_shows_thoughts",
        "_tags",
        "finish_reason",
        "index",
        "num_cached",
        "num_calls",
        "num_generated",
        "request_id",
        "tokenizer",
    )

    def __init__(
        self,
        index: int,
        request_id: str,
        tokenizer: Tokenizer,
        parser: OutputParser,
        *,
        shows_thoughts: bool = True,
        tags: tuple[str, str] | None = None,
    ) -> None:
        self.index = index
        self.request_id = request_id
        self.finish_reason: str | None = None
        self.num_generated = 0
        self.num_cached = 0
        self.tokenizer = tokenizer
        self._parser = parser
        self._shows_thoughts = shows_thoughts
        self._tags = tags
        self._in_tags = False  # the first of them was written, and not the second
        self.num_calls = 0
        self._num_incomplete = 0

    @property
    def num_reasoning(self) -> int:
        """Tokens of thoughts so far."""
        return self._parser.num_reasoning_tokens

    def take(self, output: EngineOutput) -> Delta:
        """What an engine output brings; with a finish reason, also when a stop string or a call ended the choice.

        Tokens behind such an end, which come with it where drafts held, are no part of the answer and count for nothing: an
        answer and what it costs are the same however its tokens were grouped.
        """
        parser = self._parser
        token_ids = output.token_ids
        parsed, used = self._parsed(token_ids)
        has_ended = parser.stopped or parser.ended_by_call
        self.num_generated = self.num_generated + used if has_ended else output.num_generated
        self.num_cached = output.num_cached_tokens
        if has_ended:
            self._end(FinishReason.STOP, parsed)
        elif output.finish_reason is not None:
            rest = parser.finish()
            parsed = Parsed(parsed.text + rest.text, parsed.reasoning + rest.reasoning, parsed.calls + rest.calls)
            self._end(FinishReason.STOP if parser.stopped else output.finish_reason, parsed)
        elif parsed.calls:
            self._count(parsed)
        tokens = None
        if output.logprobs is not None:
            entries = list(zip(token_ids, output.logprobs, strict=True))
            tokens = [self._entry(token, logprobs) for token, logprobs in entries[:used]]
        if not self._shows_thoughts:
            parsed.reasoning = ""
        if self._tags is not None:
            parsed.text, parsed.reasoning = self._tagged(parsed.reasoning, *self._tags) + parsed.text, ""
        return Delta(self.index, parsed.text, tokens, self.finish_reason, parsed.reasoning, parsed.calls)

    def _parsed(self, token_ids: Sequence[int]) -> tuple[Parsed, int]:
        """What these tokens bring, and how many of them up to the one that ends the choice early."""
        parser = self._parser
        if len(token_ids) < 2 or not parser.can_end:
            return parser.push(token_ids), len(token_ids)
        parsed = Parsed()
        for used in range(1, len(token_ids) + 1):
            more = parser.push(token_ids[used - 1 : used])
            parsed = Parsed(parsed.text + more.text, parsed.reasoning + more.reasoning, parsed.calls + more.calls)
            if parser.stopped or parser.ended_by_call:
                break
        return parsed, used

    def _tagged(self, thoughts: str, begin: str, end: str) -> str:
        """Thoughts as they stand in the text. Those that the answer ended within have no end tag, as the model left them."""
        if thoughts and not self._in_tags:
            thoughts = f"{begin}\n{thoughts}"
            self._in_tags = True
        if self._in_tags and not self._parser.in_thoughts:
            thoughts += f"\n{end}\n\n"
            self._in_tags = False
        return thoughts

    def _end(self, reason: FinishReason, parsed: Parsed) -> None:
        self._count(parsed)
        called = reason is FinishReason.STOP and self.num_calls > self._num_incomplete
        self.finish_reason = TOOL_CALLS if called else reason

    def _count(self, parsed: Parsed) -> None:
        for piece in parsed.calls:
            self.num_calls += bool(piece.name)
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
