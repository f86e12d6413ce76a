"""Test cases of a policy: questions with the expected answers, which a policy must give before it is taken.

    subject,tenant,object,action,expected
    key:3fKq9Zt1XwYb,acme,model/acme-chat,generate,allow
    role:user,globex,model/acme-chat,generate,deny

A subject `role:<name>` stands for somebody whose credential brings that role and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from inferflux_core.access.policy.casbin_policy import Policy
from inferflux_core.access.policy.file import (
    MAX_PROBLEMS,
    PolicyError,
    Problem,
    decode_lines,
    did_you_mean,
    is_tenant,
    split_fields,
)
from inferflux_core.access.policy.match import MAX_OBJECT_CHARS
from inferflux_core.identity import ACTIONS, Action, Principal

HEADER = ["subject", "tenant", "object", "action", "expected"]


@dataclass(frozen=True, slots=True)
class PolicyCase:
    """One question and the expected answer. `line` is that of the test file, from 1."""

    subject: str
    tenant: str
    object: str
    action: Action
    expected: Literal["allow", "deny"]
    line: int

    @property
    def principal(self) -> Principal:
        """Who asks."""
        kind, _, name = self.subject.partition(":")
        if kind == "role":
            return Principal(subject="user:policy-test|nobody", tenant=self.tenant, method="test", roles=frozenset((name,)))
        return Principal(subject=self.subject, tenant=self.tenant, method="test")


def read_cases(text: bytes, source: str) -> list[PolicyCase]:
    """The cases of a test file.

    Raises:
        PolicyError: naming every line that is wrong.
    """
    lines, problems = decode_lines(text)
    cases: list[PolicyCase] = []
    begun = False
    for number, line in enumerate(lines, start=1):
        try:
            fields = split_fields(line)
            if not fields or (not begun and fields == HEADER):
                continue
            begun = True
            cases.append(_case(fields, number))
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    if problems:
        raise PolicyError(source, problems[:MAX_PROBLEMS])
    return cases


def _case(fields: list[str], line: int) -> PolicyCase:
    if len(fields) != len(HEADER):
        raise ValueError(f"a case has {len(HEADER)} fields ({', '.join(HEADER)}), but this one has {len(fields)}")
    subject, tenant, obj, action, expected = fields
    if not is_tenant(tenant):
        raise ValueError(f"{tenant!r} is not a tenant; ask for one tenant, not for '*'")
    kind, _, name = obj.partition("/")
    if kind not in ("model", "api") or not name or "*" in obj or len(obj) > MAX_OBJECT_CHARS:
        raise ValueError(f"{obj!r} is not an object; ask for one 'model/<name>' or 'api/<group>', without '*'")
    if action not in ACTIONS:
        raise ValueError(f"{action!r} is not an action{did_you_mean(action, ACTIONS)}; actions are {', '.join(ACTIONS)}")
    if expected not in ("allow", "deny"):
        raise ValueError(f"{expected!r} is neither 'allow' nor 'deny', in small letters")
    return PolicyCase(subject, tenant, obj, action, cast('Literal["allow", "deny"]', expected), line)


def run_cases(policy: Policy, cases: Iterable[PolicyCase]) -> list[str]:
    """What of the cases fails, a sentence each; empty if all pass."""
    return [f"line {case.line}: {failure}" for case in cases if (failure := failure_of(policy, case)) is not None]


def failure_of(policy: Policy, case: PolicyCase) -> str | None:
    """Why a case fails; None if it passes."""
    if case.subject.startswith("role:") and case.subject not in policy.rows.roles:
        return f"the role {case.subject!r} is not declared in the policy{did_you_mean(case.subject, policy.rows.roles)}"
    decision = policy.decide(case.principal, case.object, case.action)
    if decision.allowed == (case.expected == "allow"):
        return None
    answer = "allowed" if decision.allowed else "denied"
    by = "because no rule allows it" if decision.rule is None else f"by the policy's {decision.rule}"
    return f"{case.subject!r} of {case.tenant!r}: {case.action} on {case.object!r} is {answer} {by}; expected {case.expected}"
