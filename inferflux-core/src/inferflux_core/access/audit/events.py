"""What is recorded: an event, who caused it, and fields whose values have one canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inferflux_core.identity import ANONYMOUS, Principal

Json = None | bool | int | str | list["Json"] | dict[str, "Json"]

MAX_TEXT = 512
"""Characters of a string; a longer one ends in an ellipsis."""

MAX_CONTENT = 32 * 1024
"""Characters of the field `prompt`, which `AuditLog.content` makes."""

MAX_ITEMS = 256
MAX_DEPTH = 8
_MAX_INT = 2**63
_PROMPT = "prompt"

RESERVED = frozenset({"actor", "address", "boot_id", "event", "hash", "prev", "request_id", "seq", "ts"})
"""Top-level keys of a record that fields may not use."""


@dataclass(slots=True, kw_only=True)
class AuditEvent:
    """One thing that happened.

    Attributes:
        event: what, such as `request.completed`, `auth.failed`, `key.created`, `server.start`.
        request_id: of the request; None for what no request caused.
        principal: who asked; None where that is not known.
        address: of the client; None where there is none.
        fields: what else is to be kept. No floating-point numbers: times and sizes are integers with the unit in the name
            (`latency_us`). Never a secret, a token or a header.
    """

    event: str
    request_id: str | None = None
    principal: Principal | None = None
    address: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def record_fields(event: AuditEvent) -> dict[str, Json]:
    """The event as it stands in a record, but for `boot_id`, `ts` and the chain's own keys.

    Raises:
        ValueError: a field has the name of one of the record's own.
        TypeError: a value that has no form in JSON.
    """
    if taken := RESERVED.intersection(event.fields):
        raise ValueError(f"an audit event cannot have a field named {min(taken)!r}; the record itself has one")
    fields: dict[str, Json] = {
        _text(key, MAX_TEXT): _clean(value, MAX_CONTENT if key == _PROMPT else MAX_TEXT, 1)
        for key, value in event.fields.items()
    }
    fields["event"] = _text(event.event, MAX_TEXT)
    if event.request_id is not None:
        fields["request_id"] = _text(event.request_id, MAX_TEXT)
    if event.address is not None:
        fields["address"] = _text(event.address, MAX_TEXT)
    if event.principal is not None:
        fields["actor"] = actor(event.principal)
        fields.setdefault("auth_method", _text(event.principal.method, MAX_TEXT))
    return fields


def actor(principal: Principal) -> dict[str, Json]:
    """`{kind, id, tenant, iss, name}`; `iss` only of users of an identity provider, `name` only where there is one.

    The id of `user:https://id.example.com|u1` is `u1`, its `iss` is `https://id.example.com`.
    """
    kind, _, rest = principal.subject.partition(":")
    found: dict[str, Json] = {"kind": _text(kind, MAX_TEXT), "tenant": _text(principal.tenant, MAX_TEXT)}
    if kind == "user" and "|" in rest:
        issuer, _, rest = rest.partition("|")
        found["iss"] = _text(issuer, MAX_TEXT)
    found["id"] = _text(rest or ANONYMOUS, MAX_TEXT)
    if principal.name:
        found["name"] = _text(principal.name, MAX_TEXT)
    return found


def _clean(value: Any, limit: int, depth: int) -> Json:
    """The value in the form that has one spelling only: numbers JSON readers agree on, strings of bounded length."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return _text(value, limit)
    if isinstance(value, int):
        number = int(value)
        return number if -_MAX_INT <= number < _MAX_INT else _text(hex(number), limit)
    if isinstance(value, float):
        return repr(float(value))  # as text: JSON readers differ in how they write a float again
    if depth > MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        cleaned: dict[str, Json] = {}
        for key in list(value)[:MAX_ITEMS]:
            cleaned[_text(str(key), MAX_TEXT)] = _clean(value[key], limit, depth + 1)
        return cleaned
    if isinstance(value, list | tuple):
        return [_clean(item, limit, depth + 1) for item in value[:MAX_ITEMS]]
    if isinstance(value, set | frozenset):
        return [_clean(item, limit, depth + 1) for item in sorted(value, key=str)[:MAX_ITEMS]]
    raise TypeError(f"an audit event cannot hold a {type(value).__name__}; use text, integers, lists and mappings")


def _text(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"
