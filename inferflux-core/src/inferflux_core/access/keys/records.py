"""API keys as people manage them: the record, what can be asked for when one is made or changed, and its public form.

The secret is in none of these; `KeyRing` hands it out once.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from inferflux_core.access.policy.match import pattern_problem
from inferflux_core.identity import ACTIONS, TENANT, Action, Principal
from inferflux_core.settings import Group, Limits

MAX_LIFETIME_S = 100 * 366 * 86_400.0

_MODEL_PATTERN = re.compile(r"[!-~]{1,256}")  # ASCII without spaces
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """One key. Times are Unix seconds.

    Attributes:
        id: 12 letters and digits; never used again for another key.
        name: for people.
        owner: who answers for it, for people; may be empty.
        models: patterns of model names; None allows any.
        limits: its own quota; None means `limits.default`.
        cidr: networks it may be used from; empty allows any.
        expires_at: when it stops being valid; None never.
        last_used_at: up to a minute old.
        rotated_at: when it last got a new secret.
        version: 1 when it is made; grows with every change by an administrator, not with use.
    """

    id: str
    name: str
    tenant: str
    owner: str
    scopes: frozenset[Action]
    roles: frozenset[str]
    models: tuple[str, ...] | None
    limits: Limits | None
    priority: int
    cidr: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None
    revoked_at: float | None = None
    rotated_at: float | None = None
    version: int = 1

    @classmethod
    def of(cls, terms: KeyTerms, key_id: str, *, created_at: float, expires_at: float | None) -> KeyRecord:
        """A new record for a key with these terms. `expires_at` is the caller's, since terms can say it in several ways."""
        return cls(
            id=key_id,
            name=terms.name,
            tenant=terms.tenant,
            owner=terms.owner,
            scopes=terms.scopes,
            roles=terms.roles,
            models=terms.models,
            limits=terms.limits,
            priority=terms.priority,
            cidr=terms.cidr,
            created_at=created_at,
            expires_at=expires_at,
        )


def _name(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("it must have printable characters, and no line breaks or controls")
    return text


def _owner(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must have printable characters only")
    return text


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return text


def _tenant(text: str) -> str:
    if not TENANT.fullmatch(text):
        raise ValueError(f"{text!r} must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return text


def _model_pattern(text: str) -> str:
    if not _MODEL_PATTERN.fullmatch(text):
        raise ValueError(f"{text[:128]!r} must be 1 to 256 ASCII characters without spaces")
    # One that can match nothing would make a key that may use nothing, and nobody would be told.
    if (problem := pattern_problem(text)) is not None:
        raise ValueError(f"the pattern {text!r} {problem}")
    return text


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is no network such as '10.1.0.0/16', '192.0.2.7' or '2001:db8::/32' (bits of the host part must be 0)"
        ) from None


KeyName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_name)]
Owner = Annotated[str, Field(max_length=256), AfterValidator(_owner)]
Tenant = Annotated[str, AfterValidator(_tenant)]
Scopes = Annotated[frozenset[Action], Field(min_length=1)]
Roles = Annotated[frozenset[Annotated[str, AfterValidator(_word)]], Field(max_length=64)]
ModelPatterns = Annotated[tuple[Annotated[str, AfterValidator(_model_pattern)], ...], Field(min_length=1, max_length=256)]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], Field(max_length=64)]
Lifetime = Annotated[float, Field(gt=0, le=MAX_LIFETIME_S, allow_inf_nan=False)]


class KeyTerms(Group):
    """What a key is for."""

    name: KeyName = Field(description="For people, in lists and in the audit log.")
    tenant: Tenant = Field("default", description="Whose data its requests are: caches and quotas are kept apart by tenant.")
    owner: Owner = Field("", description="Who answers for it, for people.")
    scopes: Scopes = Field(
        frozenset({"generate", "embed", "read"}), description="Actions: `generate`, `embed`, `read`, `admin` (all of them)."
    )
    roles: Roles = Field(frozenset(), description="Roles of the policy, without `role:`.")
    models: ModelPatterns | None = Field(
        None, description="Patterns of model names (`*` within a segment, `**` across); null allows any."
    )
    limits: Limits | None = Field(None, description="Its own quota; null means `limits.default`.")
    priority: Priority = Field(0, description="Of its requests in the scheduler; lower runs first.")
    cidr: Networks = Field((), description="Networks of clients that may use it; empty allows any.")
    expires_at: AwareDatetime | None = Field(
        None, description="When it stops being valid, such as `2027-01-31T00:00:00Z`; null never."
    )


class NewKey(KeyTerms):
    """What to make: the body of the admin API's create call."""

    expires_in_s: Lifetime | None = Field(None, description="Seconds until it stops being valid; instead of `expires_at`.")

    @model_validator(mode="after")
    def _sensible(self) -> NewKey:
        _one_expiry(self.expires_at, self.expires_in_s)
        return self


class KeyChange(Group):
    """What to change: the body of the admin API's update call. What is absent stays; the tenant can never change, since
    data is kept apart by it."""

    name: KeyName | None = Field(None, description="For people.")
    owner: Owner | None = Field(None, description="Who answers for it.")
    scopes: Scopes | None = Field(None, description="Actions it is for.")
    roles: Roles | None = Field(None, description="Roles of the policy, without `role:`.")
    models: ModelPatterns | None = Field(None, description="Patterns of model names; null allows any.")
    limits: Limits | None = Field(None, description="Its own quota; null means `limits.default`.")
    priority: Priority | None = Field(None, description="Of its requests in the scheduler; lower runs first.")
    cidr: Networks | None = Field(None, description="Networks of clients that may use it; empty allows any.")
    expires_at: AwareDatetime | None = Field(None, description="When it stops being valid; null never.")
    expires_in_s: Lifetime | None = Field(None, description="Seconds from now until it stops being valid.")

    @model_validator(mode="after")
    def _sensible(self) -> KeyChange:
        for field in ("name", "owner", "scopes", "roles", "priority", "cidr", "expires_in_s"):
            if field in self.model_fields_set and getattr(self, field) is None:
                raise ValueError(f"{field} cannot be null; leave it out to keep it as it is")
        _one_expiry(self.expires_at, self.expires_in_s)
        return self


def _one_expiry(expires_at: datetime | None, expires_in_s: float | None) -> None:
    if expires_at is not None and expires_in_s is not None:
        raise ValueError("expires_at and expires_in_s cannot both be given; leave one of them out")


def key_principal(record: KeyRecord) -> Principal:
    """Who uses this key."""
    return Principal(
        subject=f"key:{record.id}",
        tenant=record.tenant,
        method="api_keys",
        scopes=record.scopes,
        roles=record.roles,
        models=record.models,
        limits=record.limits,
        priority=record.priority,
        expires_at=record.expires_at,
        name=record.name,
    )


def key_public(record: KeyRecord) -> dict[str, Any]:
    """The record as JSON for API and command line; times in RFC 3339, UTC. Nothing in it is secret."""
    return {
        "id": record.id,
        "name": record.name,
        "tenant": record.tenant,
        "owner": record.owner,
        "scopes": [action for action in ACTIONS if action in record.scopes],
        "roles": sorted(record.roles),
        "models": None if record.models is None else list(record.models),
        "limits": None if record.limits is None else record.limits.model_dump(),
        "priority": record.priority,
        "cidr": list(record.cidr),
        "created_at": _rfc3339(record.created_at),
        "expires_at": _rfc3339(record.expires_at),
        "last_used_at": _rfc3339(record.last_used_at),
        "rotated_at": _rfc3339(record.rotated_at),
        "revoked_at": _rfc3339(record.revoked_at),
        "version": record.version,
    }


def _rfc3339(time: float | None) -> str | None:
    if time is None:
        return None
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
