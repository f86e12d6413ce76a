"""What a request may say of tools, and what an answer says of calls. Nothing here knows a wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object; empty for a function that takes none.
        strict: whether its arguments must match the schema even where calling is the model's choice.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """The tools of a request.

    Attributes:
        functions: those that the model is told of.
        allowed: names of those that it may call; a subset, never empty.
        must_call: whether the answer has to be a call.
        parallel: whether it may be several.
        param: wire name of the field that is wrong when a schema is refused.
    """

    functions: tuple[Function, ...]
    allowed: frozenset[str]
    must_call: bool = False
    parallel: bool = True
    param: str = "tools"

    @property
    def callable(self) -> tuple[Function, ...]:
        """Those that may be called, in the order of the request."""
        return tuple(function for function in self.functions if function.name in self.allowed)


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one call.

    Attributes:
        index: of the call in its answer, from 0.
        id, name: set on the first piece of the call and on no other.
        arguments: more of its arguments: JSON text, as the model wrote it.
        incomplete: the generation ended within this call; its last piece.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    incomplete: bool = False
