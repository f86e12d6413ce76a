"""Splits what a model writes into content and calls, as it comes.

    TaggedParser    content <tool_call>{...}</tool_call> content     marks that begin a call, maybe others that end it
    BareParser      {...}; {...}                                     an answer that begins with a call is nothing but calls

Rules of both:
- White space around calls belongs to neither; all other text is content, character by character.
- What looks like a call and is none (no JSON, a function that may not be called) is content, and is not searched again.
- A call that has been begun stays one. If its arguments stop being JSON, or the text ends, its last piece says `incomplete`.
- If calls may not be parallel, everything behind the first one is dropped.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from inferflux_core.models.tool_calls.call_reader import SPACE, CallReader, Status, beginning_at_end
from inferflux_core.models.tool_calls.calls import CallDelta, ToolRequest

Output = str | CallDelta
_SPACES = re.compile(r"[ \t\n\r]*+")


class ToolParser(ABC):
    """Reads one answer.

    What `push` and `finish` return, put together, does not depend on how the text was cut. Time is linear in the text.

    Args:
        request: what may be called.
        new_id: makes the id of a call.

    Attributes:
        num_calls: calls begun.
        is_complete: the one call of a request that is not parallel has ended: further text changes nothing.
    """

    def __init__(self, request: ToolRequest, new_id: Callable[[], str]) -> None:
        self._names = request.allowed
        self._parallel = request.parallel
        self._new_id = new_id
        self._out: list[Output] = []
        self._held = ""  # text that cannot be judged yet; never longer than a mark
        self._blank: list[str] = []  # white space that belongs to the content if more of it comes
        self._raw: list[str] = []  # what may turn out to be a call, and is content if it does not
        self._behind_call = False
        self._call: CallReader | None = None
        self._announced = False  # the first piece of that call is out
        self.num_calls = 0
        self.is_complete = False

    def push(self, text: str) -> list[Output]:
        """More text: the content and pieces of calls that can be told now, in their order."""
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text) and not self.is_complete:
            at = self._read_call(text, at) if self._call is not None else self._read_marks(text, at)
        return self._taken()

    def finish(self) -> list[Output]:
        """What was held back, when no text follows."""
        if self.is_complete:
            return []
        call = self._call
        self._raw.append(self._held)
        if call is None:
            self._finish_marks()
        elif call.name is None:
            self._reject()
        else:
            if not self._announced:
                self._begin(call)
            call.finish()
            self._pass_on(call.take(), incomplete=not call.arguments_complete)
        self._call, self._held = None, ""
        if not self._behind_call:
            self._out += self._blank
        return self._taken()

    @abstractmethod
    def _read_marks(self, text: str, at: int) -> int:
        """Read what is no call, as far as it can be told; hold back the rest. Returns how far that went."""

    @abstractmethod
    def _ended(self, *, is_call: bool) -> None:
        """A candidate has ended, or turned out to be none."""

    def _finish_marks(self) -> None:
        """The text has ended, outside of calls; `_raw` is what was read and not judged."""
        self._reject()

    def _read_call(self, text: str, at: int) -> int:
        call = self._call
        assert call is not None  # `push` looks before
        end = call.read(text, at)
        if call.begun:
            if not self._announced:
                self._begin(call)
            self._pass_on(call.take(), incomplete=call.status is Status.BROKEN)
        else:
            self._raw.append(text[at:end])
        if call.status is Status.READING:
            return end
        self._call = None
        if call.status is Status.NOT_A_CALL:
            self._reject()
        elif not self._parallel:
            self.is_complete = True
        self._ended(is_call=call.status is Status.DONE)
        return end

    def _try(self, reader: CallReader) -> None:
        """A call may follow; what leads to it is in `_raw`."""
        self._call = reader
        self._announced = False

    def _begin(self, call: CallReader) -> None:
        self._raw.clear()
        self._blank.clear()
        self._behind_call = self._announced = True
        self._out.append(CallDelta(self.num_calls, self._new_id(), call.name or ""))
        self.num_calls += 1

    def _pass_on(self, arguments: str, *, incomplete: bool) -> None:
        if not arguments and not incomplete:
            return
        last = self._out[-1] if self._out else None
        if isinstance(last, CallDelta):  # of the same call: nothing came between
            self._out[-1] = CallDelta(last.index, last.id, last.name, last.arguments + arguments, incomplete)
        else:
            self._out.append(CallDelta(self.num_calls - 1, arguments=arguments, incomplete=incomplete))

    def _reject(self) -> None:
        """What was taken for the beginning of a call is content."""
        raw = "".join(self._raw)
        self._raw.clear()
        self._content(raw)

    def _content(self, text: str) -> None:
        if self._behind_call:
            text = text.lstrip(SPACE)
        shown = text.rstrip(SPACE)
        if shown:
            self._behind_call = False
            self._out += self._blank
            self._out.append(shown)
            self._blank.clear()
        if len(shown) < len(text):
            self._blank.append(text[len(shown) :])

    def _taken(self) -> list[Output]:
        """The output so far, pieces of content put together."""
        taken: list[Output] = []
        pieces: list[str] = []
        for item in self._out:
            if isinstance(item, str):
                pieces.append(item)
                continue
            if pieces:
                taken.append("".join(pieces))
                pieces.clear()
            taken.append(item)
        if pieces:
            taken.append("".join(pieces))
        self._out.clear()
        return taken


class TaggedParser(ToolParser):
    """Calls that begin with a mark.

    Args:
        begin: the mark; `end`: the one behind a call, empty if there is none. Both may be missing behind a call.
        reader: makes the reader of a call, told its first character and the one behind a bracket of a list.
        lists: whether several calls may stand in brackets behind the mark.
    """

    def __init__(
        self,
        request: ToolRequest,
        new_id: Callable[[], str],
        *,
        begin: str,
        end: str,
        reader: Callable[[str], CallReader],
        lists: bool = False,
    ) -> None:
        super().__init__(request, new_id)
        self._begin_mark = begin
        self._end_mark = end
        self._reader = reader
        self._lists = lists
        self._in_list = False
        self._read = self._in_content

    def _read_marks(self, text: str, at: int) -> int:
        return self._read(text, at)

    def _in_content(self, text: str, at: int) -> int:
        found = text.find(self._begin_mark, at)
        end = found if found >= 0 else beginning_at_end(text, self._begin_mark, at)
        if end > at:
            self._content(text[at:end])
        if found < 0:
            self._held = text[end:]
            return len(text)
        self._raw.append(self._begin_mark)
        self._in_list = False
        self._read = self._before_call
        return found + len(self._begin_mark)

    def _before_call(self, text: str, at: int) -> int:
        end = _skip(text, at)
        self._raw.append(text[at:end])
        if end == len(text):
            return end
        if self._lists and not self._in_list and text[end] == "[":
            self._raw.append("[")
            self._in_list = True
            return end + 1
        self._try(self._reader(text[end]))
        return end

    def _ended(self, *, is_call: bool) -> None:
        self._read = self._behind if is_call and (self._in_list or self._end_mark) else self._in_content

    def _behind(self, text: str, at: int) -> int:
        """Behind a call, before the mark or bracket that ends it."""
        end = _skip(text, at)
        if end == len(text):
            return end
        if self._in_list:
            if text[end] == ",":
                self._raw.append(",")
                self._read = self._before_call
                return end + 1
            self._in_list = False
            self._read = self._behind if text[end] == "]" and self._end_mark else self._in_content
            return end + (text[end] == "]")
        if text.startswith(self._end_mark, end):
            self._read = self._in_content
            return end + len(self._end_mark)
        if self._end_mark.startswith(text[end : end + len(self._end_mark)]):
            self._held = text[end:]
            return len(text)
        self._read = self._in_content
        return end

    def _finish_marks(self) -> None:
        if self._read == self._behind or (self._in_list and self._behind_call):  # the beginning of what ends a call, or a comma
            self._raw.clear()
        self._reject()


class BareParser(ToolParser):
    """Calls without marks. Only an answer that begins with one has calls.

    Args:
        openings: texts of which one may stand before the first call, such as a fence of Markdown.
        separators: texts that may stand between calls and behind the last one.
        reader: makes the reader of a call.
    """

    _LIST: Final = "["

    def __init__(
        self,
        request: ToolRequest,
        new_id: Callable[[], str],
        *,
        openings: tuple[str, ...],
        separators: tuple[str, ...],
        reader: Callable[[], CallReader],
    ) -> None:
        super().__init__(request, new_id)
        self._openings = openings
        self._separators = separators
        self._reader = reader
        self._in_list = False
        self._only_content = False

    def _read_marks(self, text: str, at: int) -> int:
        if self._only_content:
            self._content(text[at:])
            return len(text)
        end = _skip(text, at)
        self._raw.append(text[at:end])
        if end == len(text):
            return end
        marks = self._marks()
        mark = max((mark for mark in marks if text.startswith(mark, end)), key=len, default="")
        if any(len(longer) > len(mark) and longer.startswith(text[end : end + len(longer)]) for longer in marks):
            self._held = text[end:]
            return len(text)
        if mark:
            self._raw.append(mark)
            self._in_list = mark == self._LIST or (self._in_list and mark != "]")
            self._openings = ()
            return end + len(mark)
        if text[end] == "{":
            self._openings = ()
            self._try(self._reader())
            return end
        self._only_content = True
        self._reject()
        return end

    def _marks(self) -> tuple[str, ...]:
        if self._in_list:
            return (",", "]") if self.num_calls else ()
        return self._separators if self.num_calls else (*self._openings, self._LIST)

    def _ended(self, *, is_call: bool) -> None:
        self._only_content = not is_call

    def _finish_marks(self) -> None:
        if self._behind_call and not self._only_content:
            self._raw.clear()  # separators, and the end of a list or fence
        self._reject()


def _skip(text: str, at: int) -> int:
    match = _SPACES.match(text, at)
    return match.end() if match is not None else at
