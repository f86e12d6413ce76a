"""Calls as plain JSON, for models that are told to write them so.

    {"name": "get_weather", "arguments": {"city": "Paris"}}
    [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": ...}]

A fence of Markdown around it is no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from inferflux_core.models.tool_calls import lark
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.json_call import JsonCall
from inferflux_core.models.tool_calls.parser import BareParser, ToolParser
from inferflux_core.models.tool_calls.tool_format import ToolFormat, call_object

_FENCES = ("```json", "```tool_call", "```tool_code", "```")
# Answers that cannot be taken for calls: they begin with neither a brace, nor a bracket, nor a fence
_TEXT = r"[ \t\n\r]*([^ \t\n\r{\[`](?s:.*)|`([^`](?s:.*))?|``([^`](?s:.*))?)?"


class JsonFormat(ToolFormat):
    """See the module.

    Args:
        key: what the arguments are called in calls that are enforced or shown to the model.
    """

    name: ClassVar[str] = "json"

    def __init__(self, key: str = "arguments") -> None:
        self._key = key

    def parser(self, request: ToolRequest) -> ToolParser:
        return BareParser(
            request,
            self.new_id,
            openings=_FENCES,
            separators=(";", *_FENCES),
            reader=lambda: JsonCall(request.allowed, lenient=False),
        )

    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        arguments = lark.Arguments(request, schemas)
        return lark.bare(
            request,
            calls=f'call | "[" {lark.several("call", ", ", request)} "]"' if request.parallel else "call",
            call=f'"{{" {lark.json_members(request, arguments, self._key)} "}}"',
            text=_TEXT,
            arguments=arguments,
        )

    def call_text(self, name: str, arguments: Any) -> str:
        return call_object(name, arguments, self._key)
