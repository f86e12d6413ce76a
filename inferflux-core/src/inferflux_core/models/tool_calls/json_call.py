"""Reads one call that is a JSON object."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final, Literal

from inferflux_core.models.tool_calls.call_reader import SPACE, CallReader, Status
from inferflux_core.models.tool_calls.json_reader import JsonReader, NotJsonError, Piece, StringDecoder

_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_COMPANIONS: Final = frozenset({"type", "id", "index", "tool_call_id"})  # what models write beside these


class JsonCall(CallReader):
    """`{"name": "f", "arguments": {...}}`, where `arguments` may be called `parameters`, come first, or be a string of JSON.

    Of keys that are written twice the first one counts.

    Args:
        lenient: other keys may stand beside these, and a function without arguments is a call of it: right where a mark says
            that a call follows. Otherwise any JSON object could be one, and this tells as early as it can that it is none.
    """

    __slots__ = (
        "_decoder",
        "_form",
        "_inner",
        "_is_spoilt",
        "_key",
        "_lenient",
        "_pieces",
        "_reader",
        "_seen_arguments",
        "_value",
    )

    def __init__(self, names: Collection[str], *, lenient: bool) -> None:
        super().__init__(names)
        self._lenient = lenient
        self._reader = JsonReader()
        self._pieces: list[str] = []  # of the key or name that is being read, with its quotes
        self._key = ""
        self._value: Literal["", "name", "arguments", "other"] = ""  # whose value is being read, or comes next
        self._form: Literal["", "object", "string", "scalar"] = ""  # what that value is; empty before its first character
        self._seen_arguments = False
        self._decoder = StringDecoder()
        self._inner: JsonReader | None = None  # goes over arguments that are a string
        self._is_spoilt = False  # such arguments are no JSON object

    def read(self, text: str, at: int) -> int:
        reader = self._reader
        try:
            while at < len(text):
                if self._value == "arguments" and self._form == "object" and reader.depth > 1:
                    at = reader.copy(text, at, 1, self._arguments)
                    self.arguments_complete = reader.depth == 1
                    continue
                if self._is_wrong(text[at]):
                    return self._fail(at)
                look_at_each = self._form == "string" and self._inner is None
                end = at + reader.step(text[at], 0) if look_at_each else reader.step(text, at)
                self._observe(text[at:end], end)
                if self.status is not Status.READING:
                    return end
                at = end
        except NotJsonError as error:
            return self._fail(max(error.at, at))
        return at

    def _is_wrong(self, char: str) -> bool:
        """Whether this character begins a value that makes the object no call."""
        if self._form or self._value in ("", "other") or char in SPACE:
            return False
        return char != '"' and not (self._value == "arguments" and char in "{n")

    def _observe(self, text: str, end: int) -> None:
        piece, depth = self._reader.piece, self._reader.depth
        if piece is Piece.OPEN and depth == 2 and not self._form:
            self._form = "object"
            if self._value == "arguments":
                self._arguments.append(text)
                self._begin_arguments()
        elif self._reader.ended:
            self._end_value()
            self._end(end)
        elif depth != 1 or piece in (Piece.SPACE, Piece.OPEN, Piece.CLOSE):
            return
        elif piece is Piece.COLON:
            self._form = ""
            self._value = self._kind(self._key)
            if self._value == "other" and not self._lenient and self._key not in _ARGUMENTS | _COMPANIONS | {"name"}:
                self._fail(end)
        elif piece is Piece.COMMA:
            self._end_value()
            self._value = ""
        elif self._value == "":
            self._pieces.append(text)
            if piece is Piece.KEY_END:
                self._key = self._decoded()
        else:
            self._observe_value(text, piece, end)

    def _kind(self, key: str) -> Literal["name", "arguments", "other"]:
        if key == "name" and self.name is None:
            return "name"
        return "arguments" if key in _ARGUMENTS and not self._seen_arguments else "other"

    def _observe_value(self, text: str, piece: Piece, end: int) -> None:
        first = not self._form
        if first:
            self._form = "scalar" if piece is Piece.SCALAR else "string"
        if self._value == "name":
            self._pieces.append(text)
            if piece is Piece.STRING_END:
                name = self._decoded()
                if name not in self._names:
                    self._fail(end)
                    return
                self.name = name
                self.begun = self._seen_arguments
        elif self._value == "arguments" and self._form == "string" and not first:
            if piece is Piece.STRING_END:
                self._observe_inner(self._decoder.finish(), end)
                self.arguments_complete = self._inner is not None and self._inner.ended and not self._is_spoilt
                if self._inner is None and self.status is Status.READING:  # an empty string
                    self._no_arguments()
            else:
                self._observe_inner(self._decoder.push(text), end)

    def _observe_inner(self, text: str, end: int) -> None:
        """Pass on arguments that were written as a string, and look whether they are a JSON object."""
        if self._inner is None:
            text = text.lstrip(SPACE)
            if not text:
                return
            if text[0] != "{":
                self._fail(end)
                return
            self._inner = JsonReader()
            self._begin_arguments()
        at = 0
        if not self._inner.ended and not self._is_spoilt:
            try:
                at = self._inner.copy(text, 0, 0, self._arguments)
            except NotJsonError as error:
                at = error.at  # and the rest, which is more than white space, spoils it
        if rest := text[at:]:
            self._is_spoilt = self._is_spoilt or bool(rest.strip(SPACE))
            self._arguments.append(rest)

    def _begin_arguments(self) -> None:
        self._seen_arguments = True
        self.begun = self.name is not None

    def _no_arguments(self) -> None:
        self._arguments.append("{}")
        self.arguments_complete = True
        self._begin_arguments()

    def _end_value(self) -> None:
        """At the comma or bracket behind a value: `null` for arguments is none."""
        if self._value == "arguments" and self._form == "scalar" and not self._seen_arguments:
            self._no_arguments()

    def _end(self, at: int) -> None:
        if self.name is not None and not self._seen_arguments and self._lenient:
            self._no_arguments()
        if not self.begun or not self.arguments_complete:
            self._fail(at)
        else:
            self.status = Status.DONE

    def _decoded(self) -> str:
        """The string in `_pieces`. Half a surrogate pair, which no name has, becomes a question mark."""
        text = json.loads("".join(self._pieces), strict=False)
        self._pieces.clear()
        return str(text).encode("utf-8", "replace").decode()
