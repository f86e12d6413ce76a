"""Thoughts and content of an answer, told apart while its text arrives."""

from __future__ import annotations

from enum import IntEnum

from inferflux_core.models.reasoning.formats import WHITESPACE, ReasoningFormat


class Phase(IntEnum):
    """Where an answer is. Phases come in this order; most answers skip some."""

    START = 0  # nothing but white space yet; what comes may be the begin tag
    LEAD = 1  # white space between the begin tag and the thoughts
    THOUGHTS = 2
    GAP = 3  # white space behind the end tag; what comes may be the opening tag of a wrapper
    WRAPPER_LEAD = 4  # white space between that tag and the content
    WRAPPED = 5  # content that the closing tag of a wrapper ends
    WRAPPER_TAIL = 6  # white space behind that tag
    CONTENT = 7  # whatever comes is content


_SKIPPING = frozenset({Phase.LEAD, Phase.WRAPPER_LEAD, Phase.WRAPPER_TAIL})


class ThoughtSplitter:
    """Thoughts and content of one answer.

    Only thoughts at the very start count: tags that come later are content. The tags, and the white space directly around
    them, are part of neither. Where the prompt opened the thoughts the answer needs no begin tag, and one that it writes all
    the same is dropped; so is an end tag at the very start, by which some models say that they do not think. An answer that
    ends within its thoughts has no content.

    The concatenations of what `push` and `finish` return do not depend on how the text was cut. Time is linear in the text's
    length: no white space that is held back is looked at twice.

    Args:
        family: the tags.
        is_open: the prompt ended within thoughts.

    Attributes:
        phase: where the answer is.
        had_thoughts: whether there were thoughts, be they empty.
    """

    __slots__ = ("_family", "_held", "_is_open", "_space", "had_thoughts", "phase")

    def __init__(self, family: ReasoningFormat, is_open: bool) -> None:
        self._family = family
        self._is_open = is_open
        self._space: list[str] = []  # white space that is dropped if a tag follows
        self._held = ""  # behind it: the beginning of what may become a tag
        self.phase = Phase.START
        self.had_thoughts = is_open

    @property
    def family(self) -> ReasoningFormat:
        """The tags."""
        return self._family

    @property
    def in_thoughts(self) -> bool:
        """Whether what comes next belongs to thoughts."""
        return Phase.LEAD <= self.phase <= Phase.THOUGHTS or (self.phase is Phase.START and self._is_open)

    def push(self, text: str) -> tuple[str, str]:
        """More text of the answer, as far as it can be told apart now: (thoughts, content)."""
        if self.phase is Phase.CONTENT:
            return "", text
        text, self._held = self._held + text, ""
        thoughts = ""
        if self.phase is Phase.START:
            text = self._start(text)
        text = self._skip(text)
        if self.phase is Phase.THOUGHTS:
            thoughts, text = self._until(self._family.end, text, Phase.GAP)
        if self.phase is Phase.GAP:
            text = self._gap(text)
        text = self._skip(text)
        if self.phase is not Phase.WRAPPED:
            return thoughts, text
        content, text = self._until(self._family.wrapper[1], text, Phase.WRAPPER_TAIL)
        return thoughts, content + self._skip(text)

    def finish(self) -> tuple[str, str]:
        """What was held back, when no text follows."""
        space = "".join(self._space)
        rest, self._space, self._held = self._held, [], ""
        if self.in_thoughts:
            return (rest if self.phase < Phase.THOUGHTS else space + rest), ""
        return "", (rest if self.phase is Phase.GAP else space + rest)

    def _start(self, text: str) -> str:
        """Looks for a tag that begins the answer. Returns what is left of the text for the next phase."""
        begun = text.lstrip(WHITESPACE)
        self._space.append(text[: len(text) - len(begun)])
        if not begun:
            return ""
        for tag, phase in ((self._family.begin, Phase.LEAD), (self._family.end, Phase.GAP)):
            if begun.startswith(tag):
                self._space.clear()
                self.phase = phase
                self.had_thoughts = self.had_thoughts or phase is Phase.LEAD
                return begun[len(tag) :]
            if tag.startswith(begun):
                self._held = begun
                return ""
        if self._is_open:
            self.phase = Phase.THOUGHTS
        else:
            begun = "".join(self._space) + begun  # nothing but an answer, given as it is
            self.phase = Phase.CONTENT
        self._space.clear()
        return begun

    def _until(self, tag: str, text: str, after: Phase) -> tuple[str, str]:
        """(text before the tag and the white space at it, text behind the tag); the latter is empty while there is no tag."""
        at = text.find(tag)
        end = at if at >= 0 else len(text) - _beginning(text, tag)
        before = text[:end].rstrip(WHITESPACE)
        if before:
            shown = "".join(self._space) + before
            self._space = [text[len(before) : end]]
        else:
            shown = ""
            self._space.append(text[:end])
        if at < 0:
            self._held = text[end:]
            return shown, ""
        self._space.clear()
        self.phase = after
        return shown, text[at + len(tag) :]

    def _gap(self, text: str) -> str:
        """Looks for the opening tag of a wrapper. Returns what is left of the text for the next phase."""
        opening, closing = self._family.wrapper
        text = text.lstrip(WHITESPACE)
        if not text:
            return ""
        if opening and text.startswith(opening):
            self.phase = Phase.WRAPPER_LEAD
            return text[len(opening) :]
        if opening.startswith(text):
            self._held = text
            return ""
        self.phase = Phase.WRAPPED if closing and not opening else Phase.CONTENT
        return text

    def _skip(self, text: str) -> str:
        """Drops white space where it belongs to nothing, up to the next phase."""
        if self.phase in _SKIPPING and (text := text.lstrip(WHITESPACE)):
            self.phase = Phase(self.phase + 1)
        return text


def _beginning(text: str, tag: str) -> int:
    """Length of the longest end of the text that is the beginning of the tag, but not all of it."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
