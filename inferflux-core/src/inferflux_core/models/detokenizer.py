"""Token ids to text as they come: never half a code point, never the beginning of what may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from inferflux_core.interfaces import Tokenizer


class StopStrings:
    """Ends a growing text before the first of some strings.

    The concatenation of what `push` and `finish` return does not depend on how the text was cut.

    Attributes:
        found: one of the strings was found; the text ends before it, and what follows is ignored.
    """

    __slots__ = ("_held", "_longest", "_stops", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that can be shown now."""
        if self.found:
            return ""
        text = self._held + text
        end = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if end >= 0:
            self.found = True
            self._held = ""
            return text[:end]
        keep = self._possible_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back, when nothing follows that could complete a stop string."""
        text, self._held = self._held, ""
        return text

    def _possible_stop(self, text: str) -> int:
        """Where the longest suffix begins that is the beginning of a stop string; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


class Detokenizer:
    """Text of one growing sequence.

    The concatenation of what `push` and `finish` return does not depend on how the tokens were grouped.
    """

    __slots__ = ("_partial", "_piece", "_special")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._piece = tokenizer.token_bytes
        self._special = not skip_special_tokens
        self._partial = b""  # the beginning of a code point

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that can be shown now."""
        piece, special = self._piece, self._special
        if len(token_ids) == 1:  # nearly always; the general case takes twice the time
            data = piece(token_ids[0], special=special)
        else:
            data = b"".join([piece(token, special=special) for token in token_ids])
        return self._decode(data)

    def push_shown(self, token_ids: Sequence[int], shown: frozenset[int]) -> str:
        """As `push`, with the text of these control tokens too."""
        piece, special = self._piece, self._special
        return self._decode(b"".join([piece(token, special=special or token in shown) for token in token_ids]))

    def finish(self) -> str:
        """What was held back, when no token follows: an unfinished code point, as U+FFFD."""
        text = self._partial.decode("utf-8", "replace")
        self._partial = b""
        return text

    def _decode(self, data: bytes) -> str:
        if self._partial:
            data = self._partial + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[used:]
        return text
