"""pydantic's validation errors to one sentence a person can act on, and the dotted path of the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from inferflux_core.errors import InvalidRequestError

TAG_MARK = "#"  # alternatives of a union are tagged with names that begin so; they are no part of a client's path
_MAX_PATH = 200


def first_error(error: ValidationError) -> InvalidRequestError:
    """The first thing wrong with a request, as OpenAI reports it: one error, one `param`."""
    details = error.errors(include_url=False, include_context=True, include_input=True)[0]
    path = dotted_path(details["loc"])
    if details["type"] == "missing":
        return InvalidRequestError(f"Missing required parameter: {path!r}.", param=path)
    reason = _reason(details)
    return InvalidRequestError(f"Invalid value for {path!r}: {reason}{_received(details['input'])}.", param=path)


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
    message = str(details["msg"]).removeprefix("Value error, ").rstrip(".")
    message = message.replace("Input should be", "it should be").replace("valid dictionary", "object")
    return message.replace("valid list", "array").replace("a object", "an object").replace("a array", "an array")


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
