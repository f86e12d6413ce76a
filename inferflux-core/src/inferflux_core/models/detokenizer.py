"""Token ids to text as they come: never half a code point, never the beginning of what may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from inferflux_core.interfaces import Tokenizer


class Detokenizer:
    """Text of one growing sequence.

    The concatenation of what `push` and `finish` return does not depend on how the tokens were grouped.

    Attributes:
        stopped: a stop string was found; the text ends before it, and further tokens are ignored.
    """

    __slots__ = ("_decoder", "_held", "_longest", "_special", "_stops", "_tokenizer", "stopped")

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._special = not skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that can be shown now."""
        if self.stopped:
            return ""
        piece = self._tokenizer.token_bytes
        data = b"".join([piece(token, special=self._special) for token in token_ids])
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, when no token follows. An unfinished code point becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", True))
        if not self.stopped:
            text += self._held
            self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        end = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if end >= 0:
            self.stopped = True
            self._held = ""
            return text[:end]
        keep = self._possible_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def _possible_stop(self, text: str) -> int:
        """Where the longest suffix begins that is the beginning of a stop string; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
