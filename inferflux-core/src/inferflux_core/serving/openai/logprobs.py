"""Token entries of the pipeline to OpenAI's two shapes of `logprobs`."""

from __future__ import annotations

from collections.abc import Iterable

from inferflux_core.serving.generation import TokenEntry, TokenText
from inferflux_core.serving.openai.wire import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

# OpenAI's value for a token that is very unlikely; JSON has no minus infinity.
LEAST_LOGPROB = -9999.0


def chat_logprobs(entries: Iterable[TokenEntry]) -> ChatLogprobs:
    """`logprobs` of a chat choice or chunk."""
    return ChatLogprobs(
        [
            TokenLogprob(
                entry.drawn.token,
                _finite(entry.drawn.logprob),
                list(entry.drawn.bytes),
                [TopLogprob(top.token, _finite(top.logprob), list(top.bytes)) for top in entry.top],
            )
            for entry in entries
        ]
    )


def completion_logprobs(entries: Iterable[TokenEntry], offset: int) -> tuple[CompletionLogprobs, int]:
    """`logprobs` of a text choice or chunk, and the offset at which the next chunk goes on.

    Args:
        offset: characters of generated text before the first of these tokens.
    """
    result = CompletionLogprobs([], [], [], [])
    for entry in entries:
        result.tokens.append(entry.drawn.token)
        result.token_logprobs.append(_finite(entry.drawn.logprob))
        result.top_logprobs.append(_by_text(entry))
        result.text_offset.append(offset)
        offset += len(entry.drawn.token)
    return result, offset


def _by_text(entry: TokenEntry) -> dict[str, float]:
    """Alternatives by text, the drawn token always among them; of tokens with equal text the most likely one counts."""
    texts: dict[str, float] = {}
    alternatives: list[TokenText] = [*entry.top, entry.drawn]
    for token in alternatives:
        texts.setdefault(token.token, _finite(token.logprob))
    return texts


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # also what NaN becomes
