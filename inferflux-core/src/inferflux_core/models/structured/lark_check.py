"""Grammars that clients write in llguidance's Lark: what they may not use, and schemas within them.

Control tokens are the server's: a client that could name them could write a turn of somebody else into the answer. Nor may a
grammar set options of the library, or refer to grammars that are not its own.
"""

from __future__ import annotations

import json
import re
from typing import Final

from inferflux_core.models.structured.grammar_text import GrammarTextError
from inferflux_core.models.structured.json_schema import rewritten
from inferflux_core.settings import StructuredOutputSettings

_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\n]+|//[^\n]*|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)
    |(?P<directive>%[A-Za-z_]+)
    |(?P<name>[?!]?_?[A-Za-z0-9_.-]+)
    |(?P<sign>->|\.\.|[][(){}:|&~*+?,=!-])
    """,
    re.VERBOSE,
)
_DIRECTIVES: Final = frozenset({"%json", "%ignore", "%import", "%regex"})
_ATTRIBUTES: Final = frozenset({"max_tokens", "temperature", "stop", "stop_capture"})


def checked_lark(text: str, limits: StructuredOutputSettings) -> str:
    """The grammar with its schemas (`%json {...}`) rewritten as those of requests are.

    Raises:
        GrammarTextError: it uses what a client may not use, or cannot be read.
        Refused: a schema in it cannot be held.
    """
    if text.lstrip().startswith("{"):
        raise GrammarTextError("a grammar is Lark or GBNF; for a JSON schema use 'response_format'", text, 0)
    parts: list[str] = []
    at, brackets = 0, False
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise GrammarTextError(_complaint(text[at]), text, at)
        kind, found = token.lastgroup, token.group()
        if kind == "directive":
            if found not in _DIRECTIVES:
                raise GrammarTextError(f"{found[:40]!r} cannot be used here", text, at)
            if found == "%json":
                form, end = _schema(text, token.end(), limits)
                parts.append("%json " + form)
                at = end
                continue
            if found == "%regex":
                end = _value(text, token.end())[1]
                parts.append(text[at:end])
                at = end
                continue
        if kind == "sign":
            brackets = found == "[" or (brackets and found != "]")
        if kind == "name" and brackets and found in _ATTRIBUTES:
            raise GrammarTextError(f"the attribute {found!r} cannot be used here", text, at)
        parts.append(" " if kind == "space" and "\n" not in found and found[0] in "/#" else found)
        at = token.end()
    return "".join(parts)


def _complaint(char: str) -> str:
    if char == "<":
        return "control tokens ('<...>') cannot be used; write texts in quotes"
    if char == "@":
        return "other grammars ('@...') cannot be used"
    if char in "\"/'":
        return "a string or regular expression does not end"
    return f"unexpected {char!r}"


def _value(text: str, at: int) -> tuple[object, int]:
    start = len(text) - len(text[at:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        raise GrammarTextError("this is not JSON", text, start) from None


def _schema(text: str, at: int, limits: StructuredOutputSettings) -> tuple[str, int]:
    schema, end = _value(text, at)
    return json.dumps(rewritten(schema, limits), ensure_ascii=False), end
