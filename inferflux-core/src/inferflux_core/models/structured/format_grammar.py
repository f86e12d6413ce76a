"""The grammar of an `OutputFormat`, for llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.gbnf import is_gbnf, lark_of_gbnf
from inferflux_core.models.structured.grammar_text import GrammarTextError
from inferflux_core.models.structured.json_schema import schema_grammar
from inferflux_core.models.structured.lark_check import checked_lark
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.models.structured.pattern_syntax import PatternError, parse, without_edges, write
from inferflux_core.models.structured.schema_document import Refused
from inferflux_core.settings import StructuredOutputSettings

_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


def grammar_of(format: OutputFormat, limits: StructuredOutputSettings) -> str:
    """The grammar (Lark) of all answers that a format allows.

    Raises:
        InvalidRequestError: the format is malformed, beyond the limits, or cannot be enforced.
    """
    param = format.param
    match format.kind, format.value:
        case "json_object", _:
            return schema_grammar(_ANY_OBJECT, param=param, limits=limits, whitespace_pattern=format.whitespace_pattern)
        case "json_schema", schema:
            return schema_grammar(schema, param=param, limits=limits, whitespace_pattern=format.whitespace_pattern)
        case "regex", str(pattern):
            return _regex(pattern, param, limits)
        case "choice", list() | tuple() as texts:
            return _choice(texts, param, limits)
        case "grammar", str(text):
            return _grammar(text, param, limits)
    raise InvalidRequestError(f"Invalid value for {param!r}: it is not what a {format.kind} needs.", param=param)


def _regex(pattern: str, param: str, limits: StructuredOutputSettings) -> str:
    _check_size(len(pattern.encode("utf-8", "replace")), param, limits)
    try:
        tree = without_edges(parse(pattern))
    except PatternError as error:
        raise InvalidRequestError(f"Invalid pattern for {param!r}: it {error}.", param=param, code="invalid_grammar") from None
    text = write(tree)
    return f"start: /{text}/\n" if text else 'start: ""\n'


def _choice(texts: Sequence[object], param: str, limits: StructuredOutputSettings) -> str:
    unique = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    if not unique or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            f"Invalid value for {param!r}: it should be a list of one text or more.", param=param, code="invalid_grammar"
        )
    if len(unique) > limits.max_enum:
        raise InvalidRequestError(
            f"Invalid value for {param!r}: it has {len(unique)} choices; the most is {limits.max_enum}.",
            param=param,
            code="invalid_grammar",
        )
    _check_size(sum(len(text.encode("utf-8", "replace")) for text in unique), param, limits)
    if not any(unique):
        return 'start: ""\n'
    # One terminal of all: each is a whole text, so that one may begin another.
    choices = " | ".join(literal(text) for text in unique if text)
    return f"start: CHOICE{' |' if '' in unique else ''}\nCHOICE: {choices}\n"


def _grammar(text: str, param: str, limits: StructuredOutputSettings) -> str:
    _check_size(len(text.encode("utf-8", "replace")), param, limits)
    try:
        return lark_of_gbnf(text) if is_gbnf(text) else checked_lark(text, limits)
    except GrammarTextError as error:
        raise InvalidRequestError(f"Invalid grammar for {param!r}: {error}.", param=param, code="invalid_grammar") from None
    except Refused as refusal:
        raise refusal.error(param) from None


def _check_size(size: int, param: str, limits: StructuredOutputSettings) -> None:
    if size > limits.max_bytes:
        raise InvalidRequestError(
            f"Invalid value for {param!r}: it has {size} bytes; the most is {limits.max_bytes}.",
            param=param,
            code="invalid_grammar",
        )


def literal(text: str) -> str:
    """A string of Lark, which are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
