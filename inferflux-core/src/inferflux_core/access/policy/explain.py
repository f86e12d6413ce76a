"""Why a policy decides as it does: for administrators, on the admin API and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux_core.access.policy.casbin_policy import Decision, Policy, Standing
from inferflux_core.access.policy.file import Rule, is_tenant
from inferflux_core.access.policy.match import MAX_OBJECT_CHARS, is_plain
from inferflux_core.identity import ACTIONS, ANONYMOUS, Action, Principal

NEAREST = 5


@dataclass(frozen=True, slots=True)
class RoleGrant:
    """A role that a principal has or brings.

    Attributes:
        via: the row that gives it with its line, or `credential`.
        effective: False for a role that a credential brings and the policy does not declare.
    """

    role: str
    via: str
    effective: bool


@dataclass(frozen=True, slots=True)
class NearRule:
    """A rule that did not match, and the reasons."""

    rule: str
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and what it rests on. Every field can be written as JSON.

    Attributes:
        matching: the rules that match, those that deny first.
        nearest: up to five rules that nearly match, nearest first.
        note: why the question is denied whatever the rules say; None if they decide.
    """

    decision: Decision
    subject: str
    tenant: str
    object: str
    action: str
    roles: tuple[RoleGrant, ...]
    matching: tuple[str, ...]
    nearest: tuple[NearRule, ...]
    note: str | None


def explain(policy: Policy, principal: Principal, obj: str, action: Action) -> Explanation:
    """See `Policy.explain`."""
    note = _note(principal, obj, action)
    grants = _grants(policy, principal) if note is None else ()
    names = {grant.role for grant in grants if grant.effective} | {principal.subject}
    matching, near = [], []
    for rule in policy.rows.rules if note is None else ():
        why = _misses(policy, rule, principal, names, obj, action)
        if why:
            near.append((len(why), rule.line, NearRule(str(rule), why)))
        else:
            matching.append((rule.effect != "deny", rule.line, str(rule)))
    near.sort(key=lambda n: n[:2])
    return Explanation(
        decision=policy.decide(principal, obj, action),
        subject=principal.subject,
        tenant=principal.tenant,
        object=obj,
        action=action,
        roles=grants,
        matching=tuple(text for _, _, text in sorted(matching)),
        nearest=tuple(rule for _, _, rule in near[:NEAREST]),
        note=note,
    )


def _note(principal: Principal, obj: str, action: str) -> str | None:
    if principal.subject in ("", ANONYMOUS):
        return "a request without a credential is allowed nothing by a policy"
    if principal.subject.startswith("role:"):
        return "a role is not a subject"
    if not is_plain(principal.subject) or not is_tenant(principal.tenant):
        return "the subject has a control character, or the tenant is not the name of one"
    if action not in ACTIONS:
        return f"{action!r} is not an action"
    kind, _, name = obj.partition("/")
    if kind not in ("model", "api") or not name or not is_plain(obj) or len(obj) > MAX_OBJECT_CHARS:
        return f"{obj!r} is not an object; those are 'model/<name>' and 'api/<group>'"
    return None


def _grants(policy: Policy, principal: Principal) -> tuple[RoleGrant, ...]:
    found: dict[str, RoleGrant] = {}
    for name in sorted(principal.roles):
        role = f"role:{name}"
        found[role] = RoleGrant(role, "credential", role in policy.rows.roles)
    for binding in policy.bindings_of(principal.subject, principal.tenant):
        found.setdefault(binding.role, RoleGrant(binding.role, str(binding), True))
    direct = frozenset(role for role, grant in found.items() if grant.effective)
    for role, by in policy.roles_of(Standing(principal.tenant, direct, None)).items():
        if by is not None:
            found[role] = RoleGrant(role, str(by), True)
    return tuple(found.values())


def _misses(policy: Policy, rule: Rule, principal: Principal, names: set[str], obj: str, action: Action) -> tuple[str, ...]:
    why = []
    if rule.subject not in names:
        role = rule.subject.startswith("role:")
        why.append(f"the subject does not have {rule.subject!r}" if role else f"it is for {rule.subject!r}")
    if rule.tenant not in ("*", principal.tenant):
        why.append(f"it is for the tenant {rule.tenant!r}, not {principal.tenant!r}")
    if not policy.object_matches(rule.object, obj):
        why.append(f"its object {rule.object!r} does not match")
    if not policy.implies(rule.action, action):
        why.append(f"it is for {rule.action!r}, not {action!r}")
    return tuple(why)
