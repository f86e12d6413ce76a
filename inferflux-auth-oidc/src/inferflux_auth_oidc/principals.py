"""From checked claims to a principal. What claims say is still text of strangers: every value is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferflux_auth_oidc.claim_checks import check_subject, expiry
from inferflux_auth_oidc.refusal import Refusal
from inferflux_auth_oidc.settings import IssuerSettings
from inferflux_core.identity import ACTIONS, TENANT, Action, Principal

_MAX_ROLES = 256
_MAX_ROLE = 256  # characters
_MAX_NAME = 128  # characters


class PrincipalMap:
    """How one issuer's claims become principals."""

    def __init__(self, issuer: IssuerSettings) -> None:
        self._issuer = issuer
        self._actions: dict[str, Action] = {issuer.scope_of(action): action for action in ACTIONS}

    def principal(self, claims: Mapping[str, Any]) -> Principal:
        """Who holds a token with these claims, which were checked.

        Raises:
            Refusal: `token_claims` for a value of a wrong form, `token_tenant` for a tenant that is missing or not allowed,
                `token_roles` for more roles than are looked at: leaving some out could drop one that a policy denies.
        """
        names = self._issuer.claims
        subject = check_subject(find_claim(claims, names.subject))
        scopes = _words(find_claim(claims, names.scope))
        name = find_claim(claims, names.name)
        return Principal(
            subject=f"user:{self._issuer.issuer}|{subject}",
            tenant=self._tenant(find_claim(claims, names.tenant)),
            method="oidc",
            scopes=frozenset(self._actions[scope] for scope in scopes if scope in self._actions),
            roles=self._roles(find_claim(claims, names.roles)),
            # Until then `authenticate` accepts it; ending a stream at `exp` itself would contradict that.
            expires_at=expiry(claims) + self._issuer.leeway_s,
            scope_prefix=self._issuer.scope_prefix,
            name=name if isinstance(name, str) and len(name) <= _MAX_NAME and name.isprintable() else "",
        )

    def _tenant(self, value: object) -> str:
        if value is None:
            value = self._issuer.default_tenant
        if not isinstance(value, str) or TENANT.fullmatch(value) is None:
            raise Refusal("token_tenant")
        if self._issuer.allowed_tenants and value not in self._issuer.allowed_tenants:
            raise Refusal("token_tenant")
        return value

    def _roles(self, value: object) -> frozenset[str]:
        values = _words(value)
        if len(values) > _MAX_ROLES or any(len(role) > _MAX_ROLE or not role.isprintable() for role in values):
            raise Refusal("token_roles")
        if self._issuer.roles:
            return frozenset(self._issuer.roles[role] for role in values if role in self._issuer.roles)
        return frozenset(role for role in values if role)


def find_claim(claims: Mapping[str, Any], name: str) -> object:
    """The claim of this name, or the one that a JSON pointer (RFC 6901) leads to through objects; None if there is none."""
    if not name.startswith("/"):
        return claims.get(name)
    found: object = claims
    for part in name[1:].split("/"):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _words(value: object) -> list[str]:
    """A list of strings as it is, a string by its words, nothing as none. Raises Refusal for anything else."""
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    raise Refusal("token_claims")
