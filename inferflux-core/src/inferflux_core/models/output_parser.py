"""The text of an answer as its tokens come: thoughts, content and calls, each in its own place.

token ids -> UTF-8 -> thoughts | the rest -> calls | content -> stop strings
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.detokenizer import Detokenizer, StopStrings
from inferflux_core.models.reasoning.splitter import Phase, ThoughtSplitter
from inferflux_core.models.tool_calls.calls import CallDelta
from inferflux_core.models.tool_calls.parser import ToolParser

_NONE: frozenset[int] = frozenset()


@dataclass(slots=True)
class Parsed:
    """What some tokens brought. In the answer the thoughts stand before the text; text and calls may alternate."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class OutputParser:
    """The parser of one choice. Its answer does not depend on how the tokens were grouped.

    Stop strings count in the content only: neither in thoughts nor in calls, nor across a call, nor across the line between
    thoughts and content. Content ends before the first of them, and calls that would follow it are not part of the answer;
    calls before it are. A call that is open cannot be ended by a stop string, since everything in it belongs to the call.

    Control tokens are hidden unless `skip_special_tokens` is False, but for those of `markers`, which the parsers of thoughts
    and calls get to see: a marker of thoughts until the content begins, any other everywhere but in thoughts. What a parser
    does not take for a tag, it gives back as text.

    Args:
        stop: stop strings; no part of the answer.
        splitter: None if the answer is not searched for thoughts.
        tools: None if it is not searched for calls.
        markers: texts of the control tokens that mark calls; those that mark thoughts are the splitter's.

    Attributes:
        num_reasoning_tokens: tokens of the thoughts so far, the tags and the white space in front of them included.
    """

    __slots__ = (
        "_call_markers",
        "_detokenizer",
        "_plain",
        "_splitter",
        "_stops",
        "_thought_markers",
        "_tools",
        "_unsettled",
        "num_reasoning_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        splitter: ThoughtSplitter | None = None,
        tools: ToolParser | None = None,
        markers: Collection[str] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop) if stop else None
        self._splitter = splitter
        self._tools = tools
        self._plain = splitter is None and tools is None
        self._thought_markers = _ids(tokenizer, splitter.family.markers) if splitter is not None else _NONE
        self._call_markers = _ids(tokenizer, markers) if tools is not None else _NONE
        self._unsettled = 0  # tokens of which it is not known yet whether they begin thoughts
        self.num_reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. What follows is ignored."""
        return self._stops is not None and self._stops.found

    @property
    def ended_by_call(self) -> bool:
        """Whether the answer is complete with its last call. What follows is ignored."""
        return self._tools is not None and self._tools.is_complete and not self.stopped

    @property
    def in_thoughts(self) -> bool:
        """Whether what comes next belongs to thoughts."""
        return self._splitter is not None and self._splitter.in_thoughts

    @property
    def can_end(self) -> bool:
        """Whether a stop string or a call may end the answer before the engine does."""
        return self._stops is not None or self._tools is not None

    def push(self, token_ids: Sequence[int]) -> Parsed:
        """What more tokens bring, as far as it can be told now."""
        if self._plain:
            text = self._detokenizer.push(token_ids)
            return Parsed(text if self._stops is None else self._stops.push(text))
        parsed = Parsed()
        at = 0
        while self._splitter is not None and self._splitter.phase is not Phase.CONTENT and at < len(token_ids):
            self._push_early(self._splitter, token_ids[at : at + 1], parsed)
            at += 1
        self._content(self._detokenizer.push_shown(token_ids[at:], self._call_markers), parsed)
        return parsed

    def finish(self) -> Parsed:
        """What was held back, when no token follows."""
        parsed = Parsed()
        text = self._detokenizer.finish()
        if self._splitter is not None:
            thoughts, text = self._splitter.push(text)
            rest, content = self._splitter.finish()
            parsed.reasoning = thoughts + rest
            text += content
        self._content(text, parsed)
        if self._tools is not None and not self.stopped:
            self._take(self._tools.finish(), parsed)
        if self._stops is not None:
            parsed.text += self._stops.finish()
        return parsed

    def _push_early(self, splitter: ThoughtSplitter, token: Sequence[int], parsed: Parsed) -> None:
        """One token before it is sure that only content follows. One at a time: the phase decides which markers count."""
        phase = splitter.phase
        shown = self._thought_markers if phase < Phase.GAP else self._call_markers
        if phase is Phase.START and not splitter.in_thoughts:
            shown |= self._call_markers
        thoughts, content = splitter.push(self._detokenizer.push_shown(token, shown))
        if phase < Phase.GAP:
            self._unsettled += 1
            if splitter.had_thoughts:
                self.num_reasoning_tokens += self._unsettled
                self._unsettled = 0
        parsed.reasoning += thoughts
        self._content(content, parsed)

    def _content(self, text: str, parsed: Parsed) -> None:
        if not text or self.stopped:
            return
        if self._tools is None:
            parsed.text += self._unstopped(text)
        else:
            self._take(self._tools.push(text), parsed)

    def _take(self, pieces: list[str | CallDelta], parsed: Parsed) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                parsed.text += self._unstopped(piece)
                if self.stopped:
                    return
            else:
                if self._stops is not None:
                    parsed.text += self._stops.finish()
                parsed.calls.append(piece)

    def _unstopped(self, text: str) -> str:
        return text if self._stops is None else self._stops.push(text)


def _ids(tokenizer: Tokenizer, texts: Collection[str]) -> frozenset[int]:
    """The control tokens with these texts that the vocabulary has, and that are normally not shown."""
    found = set()
    for text in texts:
        if text in tokenizer.special_tokens:
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(ids) == 1 and not tokenizer.token_bytes(ids[0]):
                found.add(ids[0])
    return frozenset(found)
