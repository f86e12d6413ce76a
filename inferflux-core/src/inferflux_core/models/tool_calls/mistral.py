"""Mistral's models, of which the chat template tells the generation.

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]       to tokenizer v3; some without the space
    [TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}             v11
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}                               v13

The parser reads them all. The marks are control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from inferflux_core.models.tool_calls import lark
from inferflux_core.models.tool_calls.call_reader import CallReader, NamedCall
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.json_call import JsonCall
from inferflux_core.models.tool_calls.parser import TaggedParser, ToolParser
from inferflux_core.models.tool_calls.tool_format import ToolFormat, call_object, random_id

_BEGIN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME_BEHIND = re.compile(r"""\[TOOL_CALLS\]["'](?:\s{0,8}[+~]|\s{0,8}-?\}\}\s{0,80}\{\{-?)\s{0,8}[\w.'"\[\]]{0,80}name\b""")


class MistralFormat(ToolFormat):
    """See the module.

    Args:
        template: the chat template.
    """

    name: ClassVar[str] = "mistral"
    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _ID, _ARGUMENTS)

    def __init__(self, template: str) -> None:
        self._is_named = _ARGUMENTS in template or _NAME_BEHIND.search(template) is not None
        self._marks = [mark for mark in (_ID, _ARGUMENTS) if mark in template]
        self._space = " " if f"{_BEGIN} [" in template else ""

    def parser(self, request: ToolRequest) -> ToolParser:
        def reader(first: str) -> CallReader:
            return JsonCall(request.allowed, lenient=True) if first == "{" else NamedCall(request.allowed)

        return TaggedParser(request, self.new_id, begin=_BEGIN, end="", reader=reader, lists=True)

    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        arguments = lark.Arguments(request, schemas)
        if self._is_named:
            marks = " ".join(lark.mark(mark, special) + (" /[0-9A-Za-z]{9}/" if mark == _ID else "") for mark in self._marks)
            names = (f"{lark.literal(f.name)} {marks} {arguments.rule(f)}" for f in request.callable)
            return lark.tagged(
                request, begin=_BEGIN, body=" | ".join(names), separator="", special=special, arguments=arguments
            )
        call = f'"{{" {lark.json_members(request, arguments)} "}}"'
        calls = lark.several("item", ", ", request)
        body = f'{lark.literal(self._space + "[")} {calls} "]"\nitem: {call}'
        return lark.tagged(request, begin=_BEGIN, body=body, separator=None, special=special, arguments=arguments)

    def new_id(self) -> str:
        return random_id(9)

    def call_text(self, name: str, arguments: Any) -> str:
        if self._is_named:
            mark = _ARGUMENTS if _ARGUMENTS in self._marks else ""
            return f"{_BEGIN}{name}{mark}{json.dumps(arguments, ensure_ascii=False)}"
        return f"{_BEGIN}{self._space}[{call_object(name, arguments)}]"
