"""What reads one call: the text that a model writes between the marks of a format, piece by piece.

Where a call ends or goes wrong does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from inferflux_core.models.tool_calls.json_reader import JsonReader, NotJsonError

SPACE: Final = " \t\n\r"
_MAX_HEAD: Final = 512  # characters before the arguments that a named call may have
_HEAD_BEGINNING = re.compile(r"[ \t\n\r]*+[^ \t\n\r\[{]*+[ \t\n\r]*+(?:\[[^{]*+)?+")
_HEAD = re.compile(
    r"[ \t\n\r]*([^ \t\n\r\[{]+)[ \t\n\r]*(?:\[CALL_ID\][ \t\n\r]*[0-9A-Za-z]+[ \t\n\r]*)?(?:\[ARGS\][ \t\n\r]*)?"
)


def beginning_at_end(text: str, mark: str, at: int = 0) -> int:
    """Where the longest beginning of `mark` stands that ends `text[at:]`; the end of the text if there is none."""
    for start in range(max(at, len(text) - len(mark) + 1), len(text)):
        if mark.startswith(text[start:]):
            return start
    return len(text)


class Status(Enum):
    """READING: more is to come. DONE: the call is whole. NOT_A_CALL: it never was one. BROKEN: it was one, and its arguments
    are no JSON object."""

    READING = auto()
    DONE = auto()
    NOT_A_CALL = auto()
    BROKEN = auto()


class CallReader(ABC):
    """Reads one call.

    Attributes:
        status: how far it is.
        name: of the function, once it is known; always one that may be called.
        begun: this is a call beyond doubt: its name and the first character of its arguments were read.
        arguments_complete: all of the arguments were read, and they are a JSON object.
    """

    __slots__ = ("_arguments", "_names", "arguments_complete", "begun", "name", "status")

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._arguments: list[str] = []
        self.status = Status.READING
        self.name: str | None = None
        self.begun = False
        self.arguments_complete = False

    @abstractmethod
    def read(self, text: str, at: int) -> int:
        """Read `text[at:]`.

        Returns:
            where the call ended or went wrong; the end of the text while the status is READING.
        """

    def finish(self) -> None:  # noqa: B027  # most readers hold nothing back
        """The text has ended: arguments that could not be judged are passed on as they are."""

    def take(self) -> str:
        """The arguments that were read since the last time."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _fail(self, at: int) -> int:
        self.status = Status.BROKEN if self.begun else Status.NOT_A_CALL
        return at


class NamedCall(CallReader):
    """`name{...}`, `name[ARGS]{...}` or `name[CALL_ID]id[ARGS]{...}`, as newer Mistral models write it."""

    __slots__ = ("_head", "_reader")

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._head = ""
        self._reader = JsonReader()

    def read(self, text: str, at: int) -> int:
        if not self.begun:
            at = self._read_head(text, at)
            if not self.begun:
                return at
        try:
            at = self._reader.copy(text, at, 0, self._arguments)
        except NotJsonError as error:
            return self._fail(error.at)
        if self._reader.ended:
            self.arguments_complete = True
            self.status = Status.DONE
        return at

    def _read_head(self, text: str, at: int) -> int:
        known = len(self._head)
        self._head += text[at : at + _MAX_HEAD + 1 - known]
        match = _HEAD_BEGINNING.match(self._head)
        end = match.end() if match is not None else 0
        if end == len(self._head):
            return len(text) if end <= _MAX_HEAD else self._fail(at + end - known)
        head = _HEAD.fullmatch(self._head, 0, end)
        if self._head[end] == "{" and head is not None and head[1] in self._names:
            self.name = head[1]
            self.begun = True
            return at + end - known
        return self._fail(at + end - known)
