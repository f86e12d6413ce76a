"""Requests, formats and answers for the tests of tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from inferflux_core.models.tool_calls.calls import CallDelta, Function, ToolRequest
from inferflux_core.models.tool_calls.formats import tool_format
from inferflux_core.models.tool_calls.tool_format import ToolFormat

CITY: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS: Final[Mapping[str, Mapping[str, Any]]] = {"get": CITY, "get_x": CITY}
TEMPLATES: Final[Mapping[str, str]] = {  # what tells the formats apart
    "hermes": "<tool_call>",
    "llama3": "<|python_tag|>",
    "mistral": "[TOOL_CALLS] [",
    "mistral-v11": "'[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments",
    "mistral-v13": "'[TOOL_CALLS]' + name + '[ARGS]' + arguments",
    "gemma": "<start_of_turn>",
    "gemma-function": "<start_function_call>",
    "gemma-4": "<|tool_call>",
    "json": "",
}


class Call(NamedTuple):
    index: int
    name: str
    arguments: str
    incomplete: bool = False


def format_named(case: str) -> ToolFormat:
    found = tool_format(case.partition("-")[0], TEMPLATES[case])
    assert found is not None
    return found


def tool_request(**changes: Any) -> ToolRequest:
    """`get` and `get_x` take a city, `calc` any object, `ping` nothing; all may be called."""
    strict = changes.pop("strict", False)
    functions = (
        Function("get", "Gets.", CITY, strict=strict),
        Function("get_x", parameters=CITY, strict=strict),
        Function("calc", parameters={"type": "object"}),
        Function("ping"),
    )
    return ToolRequest(**{"functions": functions, "allowed": frozenset(function.name for function in functions), **changes})


def joined(deltas: Iterable[str | CallDelta]) -> list[str | Call]:
    """What a client puts together of the pieces; checks that they are well-formed."""
    result: list[str | Call] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, str):
            assert delta
            result[-1:] = [last + delta] if isinstance(last, str) else [last, delta] if last is not None else [delta]
        elif delta.name:
            assert delta.id
            assert delta.index == sum(isinstance(item, Call) for item in result)
            result.append(Call(delta.index, delta.name, delta.arguments, delta.incomplete))
        else:
            assert isinstance(last, Call)
            assert (delta.id, delta.index, last.incomplete) == ("", last.index, False)
            assert delta.arguments or delta.incomplete
            result[-1] = last._replace(arguments=last.arguments + delta.arguments, incomplete=delta.incomplete)
    return result


def parsed(case: str, *pieces: str, **changes: Any) -> list[str | Call]:
    """What a parser of this format makes of an answer that comes in these pieces."""
    parser = format_named(case).parser(tool_request(**changes))
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    result = joined([*deltas, *parser.finish()])
    assert parser.num_calls == sum(isinstance(item, Call) for item in result)
    return result
