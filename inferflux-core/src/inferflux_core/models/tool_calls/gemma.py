"""FunctionGemma and Gemma 4. (Gemma 2 and 3 have no notation of their own: Google's guide has them write JSON.)

    <start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>     FunctionGemma
    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>                           Gemma 4

The marks are control tokens. Where a call is enforced its arguments are plain JSON instead of this notation: a schema can be
held exactly only in JSON, these models have read much of it, and the parser reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from inferflux_core.models.tool_calls import lark
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.gemma_call import GemmaCall
from inferflux_core.models.tool_calls.parser import TaggedParser, ToolParser
from inferflux_core.models.tool_calls.tool_format import ToolFormat

FUNCTION_GEMMA: Final = ("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4: Final = ("<|tool_call>", "<tool_call|>", '<|"|>')


class GemmaFormat(ToolFormat):
    """See the module.

    Args:
        marks: what begins a call, ends it, and stands around strings.
    """

    name: ClassVar[str] = "gemma"
    markers: ClassVar[tuple[str, ...]] = FUNCTION_GEMMA + GEMMA_4

    def __init__(self, marks: tuple[str, str, str]) -> None:
        self._begin, self._end, self._quote = marks

    def parser(self, request: ToolRequest) -> ToolParser:
        return TaggedParser(
            request,
            self.new_id,
            begin=self._begin,
            end=self._end,
            reader=lambda _: GemmaCall(request.allowed, self._quote),
        )

    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        arguments = lark.Arguments(request, schemas)
        calls = " | ".join(f"{lark.literal(f'call:{f.name}')} {arguments.rule(f)}" for f in request.callable)
        return lark.tagged(
            request,
            begin=self._begin,
            body=f"({calls}) {lark.mark(self._end, special)}",
            separator="",
            special=special,
            arguments=arguments,
        )

    def call_text(self, name: str, arguments: Any) -> str:
        return f"{self._begin}call:{name}{json.dumps(arguments, ensure_ascii=False)}{self._end}"
