"""Who asks: the principal of a request, and what an auth provider implements to find it.

A request carries at most one credential. The first configured provider that `claims` it decides alone: there is no chain, and
nothing ends in an anonymous principal because a provider did not know better (CVE-2026-59822).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferflux_core.settings import Limits

Action = Literal["generate", "embed", "read", "admin"]
"""What can be done to an object. `admin` includes the others."""

ACTIONS: tuple[Action, ...] = ("generate", "embed", "read", "admin")
ANONYMOUS = "anonymous"

TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Form of a tenant's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks, and what the credential itself allows. What the policy allows comes on top: both must agree.

    Attributes:
        subject: `key:<id>`, `user:<issuer>|<sub>` or `anonymous`. Made by the provider, never chosen by a client; unique over
            all providers. Policies, limits and the audit log name it.
        tenant: whose data this is. Prefixes in the KV cache, quotas and policies are kept apart by it.
        method: name of the provider that decided, `none` for anonymous.
        scopes: actions the credential is for.
        scope_prefix: what its issuer puts before the name of an action in a scope, such as `infer:`.
        roles: roles the credential brings, without the prefix `role:`; those that the policy does not declare have no effect.
        models: patterns of model names that the credential is for (`*` within a segment, `**` across); None allows any.
        limits: the credential's own quota; None means `limits.default`.
        priority: of its requests in the scheduler; lower runs first. A request may ask for a higher value, never a lower one.
        expires_at: Unix seconds after which the credential is not valid any more; None if it does not expire.
        name: what people call it, for the audit log; never used to decide.
    """

    subject: str = ANONYMOUS
    tenant: str = "default"
    method: str = "none"
    scopes: frozenset[Action] = frozenset({"generate", "embed", "read"})
    scope_prefix: str = ""
    roles: frozenset[str] = frozenset()
    models: tuple[str, ...] | None = None
    limits: Limits | None = None
    priority: int = 0
    expires_at: float | None = None
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthContext:
    """What a provider may use of the server.

    Attributes:
        state_dir: folder of this server's own files; exists, and only this user may read it.
        resource: the server's public URL, the audience of access tokens; None if it is not configured.
        count: adds 1 to `inferflux_auth_events_total{provider,event}`; events are short fixed words.
    """

    state_dir: Path
    resource: str | None
    count: Callable[[str], None]


class AuthProvider(ABC):
    """Turns credentials of one kind into principals. Called in the server's event loop."""

    async def start(self) -> None:  # noqa: B027  # most have nothing to do here
        """Get ready. Raises ConfigError if it can never work as configured; what may come back later is no reason."""

    async def close(self) -> None:  # noqa: B027  # as above
        """Free what `start` took."""

    @abstractmethod
    def claims(self, credential: str) -> bool:
        """Whether a credential is of this provider's kind, by its form alone: no I/O, no secret compared."""

    def is_local(self, credential: str) -> bool:
        """Whether `authenticate` decides about this credential without asking anybody else.

        Such credentials are looked at even when too many others from the same address were refused, so that a noisy neighbour
        locks nobody out; those that cost somebody a request are not.
        """
        return False

    @abstractmethod
    async def authenticate(self, credential: str, address: str | None) -> Principal:
        """Who holds this credential.

        Args:
            address: of the client, behind trusted proxies its own; None where there is none.

        Raises:
            AuthenticationError: nobody; with the reason for the audit log.
            AccessUnavailableError: it cannot be found out now. Never an answer that guesses.
        """

    def metadata(self) -> Mapping[str, object]:
        """What it adds to the protected resource metadata (RFC 9728), such as `authorization_servers`; by default nothing."""
        return {}
