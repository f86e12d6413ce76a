"""How a family of models writes calls."""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.parser import ToolParser

_ALPHABET: Final = string.ascii_letters + string.digits


class ToolFormat(ABC):
    """One way to write calls: read by its parsers, enforced by its grammars.

    Attributes:
        name: what administrators call it.
        markers: texts of control tokens that the parser has to see, although control tokens are not shown otherwise.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parser(self, request: ToolRequest) -> ToolParser:
        """A parser for one answer."""

    @abstractmethod
    def grammar(self, request: ToolRequest, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]) -> str:
        """What an answer may be, as Lark for llguidance: see `constrains`.

        If the request must call: one call, or up to `lark.MAX_PARALLEL_CALLS` if it is parallel, with arguments by their
        schemas. Otherwise free text in which every call that is begun is a whole call of an allowed function, with arguments
        by its schema if the function is strict, and any object if it is not.

        Args:
            schemas: name -> checked schema of the arguments, for every strict function; those of others are held to theirs
                where a call is enforced, if it is given.
            special: text -> id of those markers that are control tokens of the vocabulary.

        Raises:
            InvalidRequestError: a schema describes something else than an object.
        """

    def constrains(self, request: ToolRequest) -> bool:
        """Whether an answer has to be held to a grammar."""
        some_are_forbidden = any(function.name not in request.allowed for function in request.functions)
        return request.must_call or some_are_forbidden or any(function.strict for function in request.callable)

    def new_id(self) -> str:
        """An id for a call, as the family's chat templates take it back."""
        return "call_" + random_id(24)

    @abstractmethod
    def call_text(self, name: str, arguments: Any) -> str:
        """A call as the model writes it; for chat templates that do not print calls."""


def random_id(length: int) -> str:
    """So many letters and digits that nobody can guess."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def call_object(name: str, arguments: Any, key: str = "arguments") -> str:
    """A call as a JSON object."""
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)
