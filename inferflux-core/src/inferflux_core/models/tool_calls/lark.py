"""Pieces of grammars for llguidance, in its dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.tool_calls.calls import Function, ToolRequest

MAX_PARALLEL_CALLS: Final = 16  # of an answer that must be calls: a small model would go on calling until max_tokens
_TEXT: Final = "TEXT: /(?s:.*)/"
_SEPARATORS: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


def literal(text: str) -> str:
    """A string of Lark, which are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def mark(text: str, special: Mapping[str, int]) -> str:
    """A mark: the token, if the vocabulary has one for it."""
    return f"<[{special[text]}]>" if text in special else literal(text)


def _free_text_until(text: str, special: Mapping[str, int]) -> str:
    """Rule `begin`: any text up to a mark and the mark, which models without a token for it, or with odd ones, spell out."""
    token = f"begin: spelt | TEXT <[{special[text]}]>" if text in special else "begin: spelt"
    return f"{token}\nspelt[lazy]: TEXT {literal(text)}"


class Arguments:
    """Rules for the arguments of functions; equal schemas share one.

    Args:
        schemas: name -> checked schema. Functions that are not strict may be missing and take any object then.
    """

    def __init__(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._request = request
        self._schemas = schemas
        self._rules: dict[str, str] = {}  # JSON text of a schema -> name of its rule

    def rule(self, function: Function) -> str:
        """The name of the rule for this function's arguments, or a literal.

        Raises:
            InvalidRequestError: its schema describes something else than an object.
        """
        if function.parameters is None:
            return literal("{}")
        if function.strict:
            schema = self._schemas[function.name]
        else:
            schema = self._schemas.get(function.name, _ANY_OBJECT) if self._request.must_call else _ANY_OBJECT
        text = json.dumps({"x-guidance": _SEPARATORS, **schema, "type": self._object(function, schema)})
        return self._rules.setdefault(text, f"arguments_{len(self._rules)}")

    @property
    def rules(self) -> list[str]:
        """The rules that were asked for, one a line."""
        return [f"{name}: %json {schema}" for schema, name in self._rules.items()]

    def _object(self, function: Function, schema: Mapping[str, Any]) -> str:
        kinds = schema.get("type", "object")
        if "object" not in ([kinds] if isinstance(kinds, str) else kinds):
            raise InvalidRequestError(
                f"The parameters of function {function.name!r} have type {kinds!r}, but arguments are always an object; write "
                "a schema of type 'object'.",
                param=self._request.param,
                code="invalid_function_parameters",
            )
        return "object"


def json_members(request: ToolRequest, arguments: Arguments, key: str = "arguments") -> str:
    """A rule body for what stands between the braces of a call that is a JSON object."""
    functions = (
        literal(f'{json.dumps(function.name, ensure_ascii=False)}, "{key}": ') + " " + arguments.rule(function)
        for function in request.callable
    )
    return literal('"name": ') + f" ({' | '.join(functions)})"


def tagged(
    request: ToolRequest,
    *,
    begin: str,
    body: str,
    separator: str | None,
    special: Mapping[str, int],
    arguments: Arguments,
) -> str:
    """A grammar for calls that begin with a mark.

    Args:
        begin: the mark.
        body: rule body for what follows it, to the end of the call.
        separator: text between two calls that follow one another, maybe empty; None if `body` holds all calls.
    """
    repeats = request.parallel and separator is not None
    if request.must_call:
        start = several("call", separator or "", request) if repeats else "call"
        head = f"call: {mark(begin, special)} body"
    else:
        start = "(begin body)* tail" if repeats else "tail | begin body"
        head = f"{_free_text_until(begin, special)}\ntail: TEXT\n{_TEXT}"
    return _joined(f"start: {start}", head, f"body: {body}", arguments)


def bare(request: ToolRequest, *, calls: str, call: str, text: str, arguments: Arguments) -> str:
    """A grammar for answers that are calls or text, told apart by how they begin.

    Args:
        calls: rule body for an answer of calls; `call`: of one call.
        text: regular expression of the answers that are text.
    """
    start = "start: calls" if request.must_call else f"start: calls | text\ntext: TEXT\nTEXT: /{text}/"
    return _joined(start, f"calls: {calls}", f"call: {call}", arguments)


def several(rule: str, separator: str, request: ToolRequest) -> str:
    """One, or up to `MAX_PARALLEL_CALLS` if calls may be parallel."""
    if not request.parallel:
        return rule
    return f"{rule} ({literal(separator) if separator else ''} {rule}){{0,{MAX_PARALLEL_CALLS - 1}}}"


def _joined(*rules: str | Arguments) -> str:
    return "\n".join(rule if isinstance(rule, str) else "\n".join(rule.rules) for rule in rules) + "\n"
