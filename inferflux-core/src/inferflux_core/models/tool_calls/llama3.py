"""Llama 3.1 to 3.3: calls without marks, told by the brace that the answer begins with.

    {"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

`<|python_tag|>` may come first. Several are joined by semicolons or line ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from inferflux_core.models.tool_calls import lark
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.json_call import JsonCall
from inferflux_core.models.tool_calls.parser import BareParser, ToolParser
from inferflux_core.models.tool_calls.tool_format import ToolFormat, call_object

_TAG = "<|python_tag|>"
# Answers that cannot be taken for calls: they begin with neither a brace, nor a bracket, nor the tag
_TEXT = r"[ \t\n\r]*([^ \t\n\r{\[<](?s:.*)|<([^|](?s:.*))?)?"


class Llama3Format(ToolFormat):
    name: ClassVar[str] = "llama3"
    markers: ClassVar[tuple[str, ...]] = (_TAG,)

    def parser(self, request: ToolRequest) -> ToolParser:
        return BareParser(
            request,
            self.new_id,
            openings=(_TAG,),
            separators=(";", _TAG),
            reader=lambda: JsonCall(request.allowed, lenient=False),
        )

    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        arguments = lark.Arguments(request, schemas)
        return lark.bare(
            request,
            calls=lark.several("call", "; ", request),
            call=f'"{{" {lark.json_members(request, arguments, "parameters")} "}}"',
            text=_TEXT,
            arguments=arguments,
        )

    def call_text(self, name: str, arguments: Any) -> str:
        return call_object(name, arguments, "parameters")
