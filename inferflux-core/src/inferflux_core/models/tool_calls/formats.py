"""Which format a model writes its calls in: told by its chat template, or by the administrator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from inferflux_core.errors import ConfigError
from inferflux_core.models.tool_calls.gemma import FUNCTION_GEMMA, GEMMA_4, GemmaFormat
from inferflux_core.models.tool_calls.hermes import HermesFormat
from inferflux_core.models.tool_calls.json_format import JsonFormat
from inferflux_core.models.tool_calls.llama3 import Llama3Format
from inferflux_core.models.tool_calls.mistral import MistralFormat
from inferflux_core.models.tool_calls.tool_format import ToolFormat

# A name of Jinja that is no attribute of something; strings; anything else. Each alternative takes at least one character, and
# a quotation mark that nothing closes is taken alone, so that this is linear.
_JINJA = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|(?P<name>(?<![\w.])[A-Za-z_]\w*+)|[^'"A-Za-z_]++|.""", re.DOTALL)
# Conventions that none of our formats reads: XML in place of JSON (Qwen3-Coder, GLM 4.5)
_FOREIGN: Final = ("<function=", "<arg_key>", "<parameter=")


class GemmaJsonFormat(JsonFormat):
    """JSON as Google's guide for Gemma 2 and 3 asks for it."""

    name = "gemma"


def tool_format(name: str, template: str | None) -> ToolFormat | None:
    """The format that a model writes calls in; None if it is to call nothing.

    Args:
        name: one of `TOOL_FORMATS`.
        template: the model's chat template; without one nobody can tell it of tools.

    Raises:
        ConfigError: there is no such format.
    """
    if name not in TOOL_FORMATS:
        raise ConfigError(f"tool_parser {name!r} does not exist; choose one of {', '.join(TOOL_FORMATS)}")
    if name == "none" or template is None:
        return None
    return _FORMATS[_detected(template) if name == "auto" else name](template)


@lru_cache(maxsize=64)  # asked for every request with tools; a long template takes more than a millisecond
def prints_tools(template: str, format: ToolFormat) -> bool:
    """Whether the chat template tells the model of tools, in a way that makes it write calls in this format."""
    if any(sign in template for sign in _FOREIGN):
        return False
    spoken = _spoken(template) or "json"  # an administrator who says so for an unknown template knows
    return format.name == spoken and "tools" in _names(template)


def _detected(template: str) -> str:
    spoken = _spoken(template)
    if spoken is not None:
        return spoken
    return "gemma" if "<start_of_turn>" in template else "hermes"


def _spoken(template: str) -> str | None:
    """The format whose marks the template has; None if it has none of any."""
    if any(marks[0] in template for marks in (FUNCTION_GEMMA, GEMMA_4)):
        return "gemma"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters":' in template):
        return "llama3"
    return None


def _gemma(template: str) -> ToolFormat:
    for marks in (FUNCTION_GEMMA, GEMMA_4):
        if marks[0] in template:
            return GemmaFormat(marks)
    return GemmaJsonFormat("parameters")


def _names(template: str) -> set[str]:
    """The names that the template's Jinja code uses."""
    return {match["name"] for code in _code(template) for match in _JINJA.finditer(code) if match["name"]}


def _code(template: str) -> Iterator[str]:
    at = 0
    while (opening := _OPENING.search(template, at)) is not None:
        closing = _CLOSING[opening.group()]
        end = template.find(closing, opening.end())
        if end < 0:
            return
        if closing != "#}":
            yield template[opening.end() : end]
        at = end + len(closing)


_OPENING = re.compile(r"\{[{%#]")
_CLOSING: Final = {"{{": "}}", "{%": "%}", "{#": "#}"}
_FORMATS: Final[Mapping[str, Callable[[str], ToolFormat]]] = {
    "hermes": lambda _: HermesFormat(),
    "llama3": lambda _: Llama3Format(),
    "mistral": MistralFormat,
    "gemma": _gemma,
    "json": lambda _: JsonFormat(),
}
TOOL_FORMATS: Final = ("auto", "none", *_FORMATS)
