"""Where a sequence stands in its thoughts, told by the bytes of its tokens."""

from __future__ import annotations

from enum import IntEnum

from inferflux_core.engine.types import Thinking

_WHITESPACE = b" \t\r\n"


class ThoughtPhase(IntEnum):
    """In this order; a sequence may skip some."""

    BEFORE = 0  # nothing yet but white space, or the beginning of the begin tag
    OPEN = 1
    CLOSING = 2  # the budget is used up: the end is forced, token by token
    OVER = 3  # what comes belongs to the answer


class Thoughts:
    """Follows one sequence from its first token to the end of its thoughts.

    As everywhere only tags at the very start begin thoughts, with nothing but white space before them, and only the first end
    tag ends them. A tag may span tokens or be a part of one. Tokens of thoughts are those drawn while they are open: not those
    of the begin tag, nor the one that completes the end tag.

    Attributes:
        phase: where the sequence is.
        had_thoughts: whether they were opened, by the prompt or by the begin tag.
        num_tokens: tokens of thoughts drawn.
    """

    __slots__ = ("_begin", "_closing", "_end", "_held", "_thinking", "had_thoughts", "num_tokens", "phase")

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._begin, self._end = thinking.begin.encode(), thinking.end.encode()
        self._held = b""  # bytes that may be the beginning of the tag that is looked for
        self._closing = 0  # tokens of the forced end that were drawn
        self.num_tokens = 0
        self.had_thoughts = thinking.is_open
        if thinking.is_open:
            self.phase = ThoughtPhase.OPEN
            self._spend(0)
        else:
            self.phase = ThoughtPhase.BEFORE if self._begin else ThoughtPhase.OVER

    def copy(self) -> Thoughts:
        """One that goes its own way."""
        twin = object.__new__(Thoughts)
        for name in Thoughts.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def forced(self) -> list[int]:
        """Tokens that must come next."""
        return self._thinking.end_token_ids[self._closing :] if self.phase is ThoughtPhase.CLOSING else []

    def advance(self, token: int, piece: bytes) -> bytes:
        """A token was drawn before the thoughts were over.

        Args:
            piece: its bytes, as those who split thoughts from the answer see them.

        Returns:
            What the token brings of the answer, behind the end tag and white space.

        Raises:
            ValueError: another token is forced.
        """
        if self.phase is ThoughtPhase.CLOSING:
            if token != self._thinking.end_token_ids[self._closing]:
                raise ValueError("the end of the thoughts was forced, and another token drawn")
            self._closing += 1
            if self._closing == len(self._thinking.end_token_ids):
                self.phase = ThoughtPhase.OVER
            return b""
        if self.phase is ThoughtPhase.BEFORE:
            return self._before(piece)
        return self._within(piece, 1)

    def _before(self, piece: bytes) -> bytes:
        held = (self._held + piece).lstrip(_WHITESPACE)
        if held.startswith(self._begin):
            self.phase, self.had_thoughts, self._held = ThoughtPhase.OPEN, True, b""
            return self._within(held[len(self._begin) :], 0)
        if self._begin.startswith(held):
            self._held = held
            return b""
        self.phase = ThoughtPhase.OVER
        return b""

    def _within(self, piece: bytes, count: int) -> bytes:
        text = self._held + piece
        at = text.find(self._end)
        if at >= 0:
            self.phase = ThoughtPhase.OVER
            return text[at + len(self._end) :].lstrip(_WHITESPACE)
        self._held = text[max(0, len(text) - len(self._end) + 1) :]
        self._spend(count)
        return b""

    def _spend(self, count: int) -> None:
        self.num_tokens += count
        if self._thinking.budget is not None and self.num_tokens >= self._thinking.budget:
            self.phase = ThoughtPhase.CLOSING
