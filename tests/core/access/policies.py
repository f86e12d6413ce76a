"""Small policies for tests."""

from __future__ import annotations

from inferflux_core.access.rbac import Policy
from inferflux_core.identity import Principal

ROLES = "role, user, admin, viewer\n"
BASE = ROLES + "p, role:user, *, model/**, generate, allow\ng, key:k1, role:user, acme\n"


def compiled(text: str) -> Policy:
    return Policy.compile(text.encode(), "policy.csv")


def who(subject: str = "key:k1", tenant: str = "acme", *roles: str) -> Principal:
    return Principal(subject=subject, tenant=tenant, method="api_keys", roles=frozenset(roles))
