"""JSON that decides who somebody is: one meaning or none.

Python's parser takes the last of duplicate names, NaN and infinite numbers; another reader of the same token may see the first
one. Whatever two readers could disagree about is refused here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of UTF-8 without duplicate names and without numbers that JSON does not have.

    Raises:
        ValueError: it is something else. The message quotes nothing of it.
    """
    try:
        document = _decoder.decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not strict JSON") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate name")
    return members


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_constant, parse_float=_finite)
