"""Tools as OpenAI's clients send them, in today's fields and in the older `functions`, and what they mean for the pipeline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo
from pydantic_core import PydanticCustomError

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.settings import ServerSettings

MOST_TOOLS = 10_000  # of any setting of server.max_tools; beyond it nothing is even looked at
MAX_TOOLS_BYTES = 1 << 20  # of all tools of a request together, as JSON
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


class FunctionTool(BaseModel):
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments; without it the function takes none.
        strict: its arguments match the schema also where calling is the model's choice.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One tool; only functions have a meaning here."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str = "function"
    function: FunctionTool | None = None


class FunctionName(BaseModel):
    """A function by its name."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str


class NamedTool(BaseModel):
    """One tool by its name: as chat completions write it (`function.name`) or as responses do (`name`)."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str = "function"
    function: FunctionName | None = None
    name: str | None = None

    def named(self, path: str) -> str:
        """The name. Raises InvalidRequestError if there is none, or if it is the name of something else than a function."""
        _check_type(self.type, path)
        if self.function is not None:
            return self.function.name
        if self.name is None:
            raise _missing(f"{path}.function.name")
        return self.name


class AllowedTools(BaseModel):
    """Which of the tools may be called, and whether one has to be."""

    model_config = ConfigDict(strict=True, extra="ignore")

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedToolsChoice(BaseModel):
    """`allowed_tools` as chat completions write it (nested) or as responses do (flat)."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)] | None = None

    def names(self) -> tuple[frozenset[str], bool]:
        """The tools that may be called, and whether one has to be."""
        mode, tools, path = self.mode, self.tools, "tool_choice"
        if self.allowed_tools is not None:
            mode, tools, path = self.allowed_tools.mode, self.allowed_tools.tools, "tool_choice.allowed_tools"
        if mode is None or tools is None:
            raise _missing("tool_choice.allowed_tools")
        return frozenset(tool.named(f"{path}.tools[{i}]") for i, tool in enumerate(tools)), mode == "required"


def _choice_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#mode"
    if isinstance(value, dict):
        return "#allowed" if value.get("type") == "allowed_tools" else "#named"
    return None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#mode")]
    | Annotated[AllowedToolsChoice, Tag("#allowed")]
    | Annotated[NamedTool, Tag("#named")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="it should be 'none', 'auto', 'required' or an object that names a tool",
    ),
]


def _call_kind(value: Any) -> str | None:
    return "#mode" if isinstance(value, str) else "#named" if isinstance(value, dict) else None


FunctionCallChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("#mode")] | Annotated[FunctionName, Tag("#named")],
    Discriminator(
        _call_kind,
        custom_error_type="function_call",
        custom_error_message="it should be 'none', 'auto' or an object that names a function",
    ),
]


def _few_enough(tools: Any, info: ValidationInfo) -> Any:
    """Counts them before pydantic looks at each, which takes a tenth of a second for thousands."""
    if isinstance(tools, list) and isinstance(info.context, ServerSettings) and len(tools) > info.context.max_tools:
        raise PydanticCustomError(
            "too_long",
            "it should have at most {most} items by this server's limit (server.max_tools), not {count}",
            {"most": info.context.max_tools, "count": len(tools)},
        )
    return tools


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True), BeforeValidator(_few_enough)]
Functions = Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True), BeforeValidator(_few_enough)]


def tool_request(
    tools: Sequence[Tool] | None,
    choice: Literal["none", "auto", "required"] | AllowedToolsChoice | NamedTool | None,
    *,
    parallel: bool = True,
) -> ToolRequest | None:
    """What `tools`, `tool_choice` and `parallel_tool_calls` say; None if nothing can be called.

    A named tool is called once, as OpenAI's models do.

    Raises:
        InvalidRequestError: a tool that is no function, a name that is not allowed or taken twice, or a
            choice of none of them.
    """
    functions = _functions([(tool.function, tool.type) for tool in tools or ()], "tools")
    if not functions:
        if choice in (None, "none", "auto"):
            return None
        raise InvalidRequestError("'tool_choice' is only allowed when 'tools' are there; send them.", param="tool_choice")
    every = frozenset(function.name for function in functions)
    if choice == "none":
        return None
    if isinstance(choice, AllowedToolsChoice):
        allowed, must_call = choice.names()
        _check_known(allowed, every, "tool_choice", "tools")
        return ToolRequest(functions=functions, allowed=allowed, must_call=must_call, parallel=parallel)
    if isinstance(choice, NamedTool):
        name = choice.named("tool_choice")
        _check_known({name}, every, "tool_choice", "tools")
        return ToolRequest(functions=functions, allowed=frozenset({name}), must_call=True, parallel=False)
    return ToolRequest(functions=functions, allowed=every, must_call=choice == "required", parallel=parallel)


def function_request(
    functions: Sequence[FunctionTool] | None, choice: Literal["none", "auto"] | FunctionName | None
) -> ToolRequest | None:
    """What the older `functions` and `function_call` say: as `tool_request`, and never more than one call."""
    known = _functions([(function, "function") for function in functions or ()], "functions")
    if not known:
        if isinstance(choice, FunctionName):
            raise InvalidRequestError(
                "'function_call' is only allowed when 'functions' are there; send them.", param="function_call"
            )
        return None
    if choice == "none":
        return None
    allowed = frozenset(function.name for function in known)
    if isinstance(choice, FunctionName):
        _check_known({choice.name}, allowed, "function_call", "functions")
        allowed = frozenset({choice.name})
    must_call = isinstance(choice, FunctionName)
    return ToolRequest(functions=known, allowed=allowed, must_call=must_call, parallel=False, param="functions")


def _functions(tools: Sequence[tuple[FunctionTool | None, str]], field: str) -> tuple[Function, ...]:
    functions: list[Function] = []
    names: set[str] = set()
    size = 0
    for index, (function, kind) in enumerate(tools):
        path = f"{field}[{index}]"
        _check_type(kind, path)
        path = f"{path}.function" if field == "tools" else path
        if function is None:
            raise _missing(path)
        _check_function(function, names, path)
        names.add(function.name)
        size += len(msgspec.json.encode([function.description, function.parameters]))
        if size > MAX_TOOLS_BYTES:
            raise InvalidRequestError(
                f"Invalid value for {field!r}: descriptions and parameters of all of them together are longer than "
                f"{MAX_TOOLS_BYTES} bytes; send fewer or shorter ones.",
                param=field,
            )
        functions.append(Function(function.name, function.description or "", function.parameters, strict=bool(function.strict)))
    return tuple(functions)


def _check_function(function: FunctionTool, names: set[str], path: str) -> None:
    if _NAME.fullmatch(function.name) is None:
        raise InvalidRequestError(
            f"Invalid value for '{path}.name': it should be 1 to 128 characters of a-z, A-Z, 0-9, '_', '.' and '-'.",
            param=f"{path}.name",
        )
    if function.name in names:
        raise InvalidRequestError(
            f"Invalid value for '{path}.name': there is another one of the name {function.name!r}; rename one of them.",
            param=f"{path}.name",
        )
    if function.parameters is not None and function.parameters.get("type", "object") != "object":
        raise InvalidRequestError(
            f'Invalid value for \'{path}.parameters\': it should be a JSON schema of an object ("type": "object").',
            param=f"{path}.parameters",
            code="invalid_json_schema",
        )


def _check_type(kind: str, path: str) -> None:
    if kind != "function":
        raise InvalidRequestError(
            f"Invalid value for '{path}.type': {kind[:40]!r} is not supported; only tools of type 'function' are.",
            param=f"{path}.type",
            code="unsupported_value",
        )


def _check_known(chosen: set[str] | frozenset[str], names: frozenset[str], param: str, field: str) -> None:
    if unknown := sorted(chosen - names):
        raise InvalidRequestError(
            f"Invalid value for {param!r}: {unknown[0][:128]!r} is none of the request's {field}; add it there or choose "
            f"another.",
            param=param,
        )


def _missing(path: str) -> InvalidRequestError:
    return InvalidRequestError(f"Missing required parameter: {path!r}.", param=path)
