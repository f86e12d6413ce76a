"""pydantic's validation errors to one sentence a person can act on, and the dotted path of the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from inferflux_core.errors import InvalidRequestError

TAG_MARK = "#"  # alternatives of a union are tagged with names that begin so; they are no part of a client's path
_MAX_PATH = 200
_LENGTHS = frozenset({"too_short", "too_long", "string_too_short", "string_too_long"})
_SUBJECT = re.compile(r"(?:Input|String|List|Dictionary) should")


def first_error(error: ValidationError) -> InvalidRequestError:
    """The first thing wrong with a request, as OpenAI reports it: one error, one `param`."""
    details = error.errors(include_url=False, include_context=True, include_input=True)[0]
    path = dotted_path(details["loc"])
    if details["type"] == "missing":
        return InvalidRequestError(f"Missing required parameter: {path!r}.", param=path)
    received = "" if details["type"] in _LENGTHS else _received(details["input"])
    return InvalidRequestError(f"Invalid value for {path!r}: {_reason(details)}{received}.", param=path)


def dotted_path(location: Sequence[int | str]) -> str:
    """`("messages", 0, "content", "#parts", 1)` is `messages[0].content[1]`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "[key]":
            continue
        elif not part.startswith(TAG_MARK):
            path += f".{part}" if path else part
    return path[:_MAX_PATH]


def _reason(details: Mapping[str, Any]) -> str:
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "it should be an object"
    if details["type"] == "list_type":
        return "it should be an array"
    message = str(details["msg"]).removeprefix("Value error, ")
    return _SUBJECT.sub("it should", message).replace(" after validation", "").rstrip(".")


def _received(value: Any) -> str:
    """What came instead: numbers as they are, anything else by its kind, since text may be private."""
    if value is None:
        return ", not null"
    if isinstance(value, bool):
        return f", not {str(value).lower()}"
    if isinstance(value, int | float):
        text = repr(value) if isinstance(value, float) or abs(value) < 10**20 else "a number of more than 20 digits"
        return f", not {text}"
    kinds: tuple[tuple[type, str], ...] = ((str, "a string"), (list, "an array"), (dict, "an object"))
    return next((f" (received {name})" for kind, name in kinds if isinstance(value, kind)), "")
