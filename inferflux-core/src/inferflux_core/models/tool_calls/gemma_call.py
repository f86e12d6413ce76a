"""Reads one call in the notation of FunctionGemma and Gemma 4, and writes its arguments as JSON.

    call:get_weather{city:<escape>Paris<escape>,days:[1,2],units:{wind:<escape>kn<escape>}}

Strings stand between two equal marks, keys are bare. What stands bare where a value belongs and is no number, true, false or
null is a string as well, because the models forget the marks now and then. Arguments whose first character is a quotation mark
are plain JSON: our own grammars make the models write them so (see `gemma`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from inferflux_core.models.tool_calls.call_reader import SPACE, CallReader, Status, beginning_at_end
from inferflux_core.models.tool_calls.json_reader import MAX_DEPTH, JsonReader, NotJsonError

_MAX_HEAD: Final = 512  # characters from `call:` to the first brace
_HEAD_BEGINNING = re.compile(r"[ \t\n\r]*+(?:c(?:a(?:l(?:l(?::[^ \t\n\r{]*+[ \t\n\r]*+)?)?)?)?)?")
_HEAD = re.compile(r"[ \t\n\r]*call:([^ \t\n\r{]+)[ \t\n\r]*")
_BARE_END = re.compile(r"[,\]}]")
_KEY_END = re.compile(r"[:,{}\[\]]")
_PLAIN_STRING = re.compile(r'(?:[^"\\]|\\.)*+', re.DOTALL)
_SCALAR = re.compile(r"(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)\Z")
_PYTHON: Final = {"True": "true", "False": "false", "None": "null"}


class _Expect(Enum):
    FIRST = auto()  # what follows the first brace
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    VALUE = auto()
    VALUE_OR_END = auto()
    COMMA_OR_END = auto()
    IN_STRING = auto()
    IN_KEY = auto()
    IN_QUOTED_KEY = auto()
    IN_PLAIN_STRING = auto()  # between quotation marks
    IN_BARE = auto()
    PLAIN_JSON = auto()


class GemmaCall(CallReader):
    """See the module.

    Args:
        quote: the mark around strings.
    """

    __slots__ = ("_expect", "_head", "_held", "_pieces", "_plain", "_quote", "_stack")

    def __init__(self, names: Collection[str], quote: str) -> None:
        super().__init__(names)
        self._quote = quote
        self._head = ""
        self._expect = _Expect.FIRST
        self._stack: list[str] = []  # the closing characters that are due
        self._pieces: list[str] = []  # of the key or bare value that is being read
        self._held = ""  # what may be the beginning of a mark
        self._plain = JsonReader()

    def read(self, text: str, at: int) -> int:
        if not self.begun:
            at = self._read_head(text, at)
            if not self.begun:
                return at
        base = at - len(self._held)
        text, self._held = self._held + text[at:], ""
        at = 0
        while at < len(text) and self.status is Status.READING:
            at = self._step(text, at)
        return base + at

    def finish(self) -> None:
        if self._expect in (_Expect.IN_KEY, _Expect.IN_BARE, _Expect.IN_PLAIN_STRING):
            opening = '"' if self._expect is _Expect.IN_PLAIN_STRING else ""
            self._arguments.append(opening + "".join(self._pieces))

    def _read_head(self, text: str, at: int) -> int:
        known = len(self._head)
        self._head += text[at : at + _MAX_HEAD + 1 - known]
        match = _HEAD_BEGINNING.match(self._head)
        end = match.end() if match is not None else 0
        if end == len(self._head):
            return len(text) if end <= _MAX_HEAD else self._fail(at + end - known)
        head = _HEAD.fullmatch(self._head, 0, end)
        if self._head[end] != "{" or head is None or head[1] not in self._names:
            return self._fail(at + end - known)
        self.name = head[1]
        self.begun = True
        self._push("{")
        self._expect = _Expect.FIRST
        return at + end + 1 - known

    def _step(self, text: str, at: int) -> int:
        """Read something of `text[at:]`; returns how far that went."""
        match self._expect:
            case _Expect.PLAIN_JSON:
                return self._in_plain_json(text, at)
            case _Expect.IN_STRING | _Expect.IN_QUOTED_KEY:
                return self._in_string(text, at)
            case _Expect.IN_PLAIN_STRING:
                return self._in_plain_string(text, at)
            case _Expect.IN_BARE | _Expect.IN_KEY:
                return self._in_bare(text, at)
        char = text[at]
        if char in SPACE:
            return at + 1
        if self._expect in (_Expect.COMMA_OR_END, _Expect.COLON):
            return self._punctuation(char, at)
        if self._expect is _Expect.FIRST:
            self._expect = _Expect.PLAIN_JSON if char == '"' else _Expect.KEY_OR_END
            return at
        is_key = self._expect in (_Expect.KEY, _Expect.KEY_OR_END)
        if text.startswith(self._quote, at):
            self._arguments.append('"')
            self._expect = _Expect.IN_QUOTED_KEY if is_key else _Expect.IN_STRING
            return at + len(self._quote)
        if self._quote.startswith(text[at : at + len(self._quote)]):
            self._held = text[at:]
            return len(text)
        if char in "}]" and self._expect in (_Expect.KEY_OR_END, _Expect.VALUE_OR_END):
            return self._close(char, at)
        if char in "{[" and not is_key and len(self._stack) < MAX_DEPTH:
            self._push(char)
            return at + 1
        if char in "{}[],:":
            return self._fail(at)
        self._pieces.clear()
        if char == '"' and not is_key:
            self._expect = _Expect.IN_PLAIN_STRING
            return at + 1
        self._expect = _Expect.IN_KEY if is_key else _Expect.IN_BARE
        return at

    def _push(self, char: str) -> None:
        self._arguments.append(char)
        self._stack.append("}" if char == "{" else "]")
        self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END

    def _close(self, char: str, at: int) -> int:
        if self._stack[-1] != char:
            return self._fail(at)
        self._arguments.append(self._stack.pop())
        self._expect = _Expect.COMMA_OR_END
        if not self._stack:
            self.arguments_complete = True
            self.status = Status.DONE
        return at + 1

    def _punctuation(self, char: str, at: int) -> int:
        if char in "}]" and self._expect is _Expect.COMMA_OR_END:
            return self._close(char, at)
        if char != ("," if self._expect is _Expect.COMMA_OR_END else ":"):
            return self._fail(at)
        self._arguments.append(char)
        self._expect = _Expect.KEY if char == "," and self._stack[-1] == "}" else _Expect.VALUE
        return at + 1

    def _in_plain_json(self, text: str, at: int) -> int:
        if not self._plain.depth:
            self._plain.step("{", 0)
        try:
            at = self._plain.copy(text, at, 0, self._arguments)
        except NotJsonError as error:
            return self._fail(error.at)
        if self._plain.ended:
            self.arguments_complete = True
            self.status = Status.DONE
        return at

    def _in_string(self, text: str, at: int) -> int:
        end = text.find(self._quote, at)
        keep = end if end >= 0 else beginning_at_end(text, self._quote, at)
        self._arguments.append(json.dumps(text[at:keep], ensure_ascii=False)[1:-1])
        if end < 0:
            self._held = text[keep:]
            return len(text)
        self._arguments.append('"')
        self._expect = _Expect.COLON if self._expect is _Expect.IN_QUOTED_KEY else _Expect.COMMA_OR_END
        return end + len(self._quote)

    def _in_plain_string(self, text: str, at: int) -> int:
        match = _PLAIN_STRING.match(text, at)
        end = match.end() if match is not None else at
        self._pieces.append(text[at:end])
        if end == len(text):
            return end
        if text[end] == "\\":  # and what it escapes is not here yet
            self._held = text[end:]
            return len(text)
        try:
            value = json.loads('"' + "".join(self._pieces) + '"', strict=False)
        except ValueError:
            self.finish()
            return self._fail(end)
        self._arguments.append(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode())
        self._expect = _Expect.COMMA_OR_END
        return end + 1

    def _in_bare(self, text: str, at: int) -> int:
        is_key = self._expect is _Expect.IN_KEY
        match = (_KEY_END if is_key else _BARE_END).search(text, at)
        end = match.start() if match is not None else len(text)
        self._pieces.append(text[at:end])
        if match is None:
            return end
        value = "".join(self._pieces).strip(SPACE)
        if is_key:
            if match.group() != ":":
                self._arguments.append(value)
                return self._fail(end)
            self._arguments.append(json.dumps(value.strip("\"'"), ensure_ascii=False))
            self._expect = _Expect.COLON
            return end
        value = _PYTHON.get(value, value)
        self._arguments.append(value if _SCALAR.match(value) else json.dumps(value, ensure_ascii=False))
        self._expect = _Expect.COMMA_OR_END
        return end
