"""JSON documents of clients: checked before they are parsed, refused with the cause and the place.

A hostile document costs little: what would make the parser build millions of objects is counted on the raw bytes first,
with operations that run at memory speed.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import msgspec

from inferflux_core.errors import InvalidRequestError

MAX_NODES = 100_000  # objects, arrays and members; bounds what the parser allocates
MAX_STRINGS = 2 * MAX_NODES
MAX_ELEMENTS = 1_000_000  # commas: all token ids of a request together

_BOM = b"\xef\xbb\xbf"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))
_DEPTH_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(":"): 0}
_BYTE_POSITION = re.compile(r"\s*\(byte (\d+)\)$")
_NON_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
# A high surrogate escape that no low one follows, or a low one that no high one precedes; an even run of backslashes
# before it means that the `\u` is an escape and not text.
_LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*(?:(?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)

_decode = msgspec.json.Decoder().decode


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a JSON object (RFC 8259). Of duplicate keys the last one counts.

    Args:
        max_depth: deepest nesting allowed; the outermost object is level 1.

    Raises:
        InvalidRequestError: with code `invalid_json`, naming the cause and, where there is one, line and column.
    """
    if not body.strip():
        _refuse("The request body is empty; send a JSON object.")
    if body.startswith(_BOM):
        _refuse("The request body begins with a byte order mark; send UTF-8 without one (RFC 8259, section 8.1).")
    _check_structure(body, max_depth)
    try:
        document = _decode(body)
    except UnicodeDecodeError:
        _refuse_utf8(body)
    except msgspec.DecodeError as error:
        _refuse_malformed(body, str(error))
    except RecursionError:
        _refuse_depth(max_depth)
    if not isinstance(document, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(document), "a number")
        _refuse(f"The request body must be a JSON object, but it is {kind}.")
    return document


def num_values(text: bytes) -> int:
    """How many objects, arrays, members and elements a JSON text has, counted on its raw bytes; of a malformed one a number
    like it."""
    outside_strings = _outside_strings(text)
    return sum(outside_strings.count(mark) for mark in (b"[", b"{", b":", b","))


def _outside_strings(body: bytes) -> bytes:
    if b"\\" in body:
        # Left to right, so that of a run of backslashes the pairs go first, as a JSON parser reads them.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 2 * MAX_STRINGS:
        _refuse_values()
    return b"".join(body.split(b'"')[::2])


def _check_structure(body: bytes, max_depth: int) -> None:
    """Bound nesting and number of values, looking at brackets, colons and quotes only.

    Malformed JSON may pass; the parser finds that. What passes cannot make the parser deep or slow.
    """
    outside_strings = _outside_strings(body)
    if outside_strings.count(b",") > MAX_ELEMENTS:
        _refuse_values()
    structure = outside_strings.translate(None, _NOT_STRUCTURE)
    depth = 0
    for character in structure[: 2 * MAX_NODES]:
        depth += _DEPTH_STEP[character]
        if depth > max_depth:
            _refuse_depth(max_depth)
    if structure.count(b"[") + structure.count(b"{") + structure.count(b":") > MAX_NODES:
        _refuse_values()


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, code="invalid_json")


def _refuse_at(body: bytes, offset: int, cause: str) -> NoReturn:
    """Name the place as editors count it: lines and columns from 1, columns in bytes."""
    line = body.count(b"\n", 0, offset) + 1
    column = offset - body.rfind(b"\n", 0, offset)
    _refuse(f"The request body is not valid JSON: {cause} at line {line} column {column}.")


def _refuse_depth(max_depth: int) -> NoReturn:
    _refuse(f"The request body is nested deeper than {max_depth} levels, the limit of this server (server.max_json_depth).")


def _refuse_values() -> NoReturn:
    _refuse(
        f"The request body has too many values: at most {MAX_NODES} objects, arrays and members, {MAX_STRINGS} strings and "
        f"{MAX_ELEMENTS} elements are read; split the request."
    )


def _refuse_utf8(body: bytes) -> NoReturn:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse_at(body, error.start, "a byte that is not UTF-8")
    _refuse("The request body is not valid JSON: its text is not UTF-8.")


def _refuse_malformed(body: bytes, reason: str) -> NoReturn:
    """Turn the parser's reason into a cause with a place, looking closer where the parser is vague."""
    position = _BYTE_POSITION.search(reason)
    truncated = "truncated" in reason
    offset = int(position[1]) if position else len(body)
    if "trailing characters" in reason:
        offset -= 1  # here the parser counts the character it has read
    if truncated or "surrogate" in reason:
        # The parser notices half a pair when it looks for the other half, a few bytes on.
        window = max(0, offset - 24)
        for match in _LONE_SURROGATE.finditer(body, window, offset + 12):
            if match["lone"] is not None:
                _refuse_at(body, match.start("lone"), "half of a surrogate pair")
    if truncated:
        _refuse_at(body, offset, "it ends too early")
    if position is None:
        _refuse(f"The request body is not valid JSON: {_tidy(reason)}.")
    start = offset - 1 if body[offset - 1 : offset] == b"-" else offset
    if literal := _NON_FINITE.match(body, start):
        _refuse_at(body, start, f"{literal[0].decode()} is not a JSON number")
    _refuse_at(body, offset, _tidy(_BYTE_POSITION.sub("", reason)))


def _tidy(reason: str) -> str:
    reason = reason.removeprefix("JSON is malformed: ").partition(" - at ")[0]
    return reason[:1].lower() + reason[1:]
