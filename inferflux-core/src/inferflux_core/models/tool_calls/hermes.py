"""Hermes 2 Pro, Qwen 2.5 and 3, and many that were trained like them.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from inferflux_core.models.tool_calls import lark
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.json_call import JsonCall
from inferflux_core.models.tool_calls.parser import TaggedParser, ToolParser
from inferflux_core.models.tool_calls.tool_format import ToolFormat, call_object

_BEGIN, _END = "<tool_call>", "</tool_call>"
_OPEN, _CLOSE = lark.literal("\n{"), lark.literal("}\n")


class HermesFormat(ToolFormat):
    name: ClassVar[str] = "hermes"
    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _END)

    def parser(self, request: ToolRequest) -> ToolParser:
        return TaggedParser(
            request,
            self.new_id,
            begin=_BEGIN,
            end=_END,
            reader=lambda _: JsonCall(request.allowed, lenient=True),
            lists=True,  # Granite writes them so
        )

    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        arguments = lark.Arguments(request, schemas)
        return lark.tagged(
            request,
            begin=_BEGIN,
            body=f"{_OPEN} {lark.json_members(request, arguments)} {_CLOSE} {lark.mark(_END, special)}",
            separator="\n",
            special=special,
            arguments=arguments,
        )

    def call_text(self, name: str, arguments: Any) -> str:
        return f"{_BEGIN}\n{call_object(name, arguments)}\n{_END}"
