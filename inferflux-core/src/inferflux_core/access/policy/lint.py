"""What is wrong with a policy as a whole: roles nobody declared, chains of roles too deep, rules without effect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

from inferflux_core.access.policy.file import MAX_PROBLEMS, PolicyError, PolicyRows, Problem, did_you_mean, read_rows
from inferflux_core.access.policy.match import compile_pattern

MAX_ROLE_DEPTH = 8
"""Most steps from a role through the roles it includes: Casbin looks no further, and would deny without a word."""
MAX_RULES = 5000
MAX_ROLES = 1000
_KEYS = "api/keys"


def check_policy(text: bytes) -> list[Problem]:
    """Everything that is wrong with a policy, in the order of its lines; errors and warnings."""
    return read_policy(text)[1]


def parse_policy(text: bytes, source: str) -> tuple[PolicyRows, tuple[Problem, ...]]:
    """The rows of a policy, and warnings about it.

    Raises:
        PolicyError: with everything that is wrong, warnings included.
    """
    rows, problems = read_policy(text)
    if any(p.severity == "error" for p in problems):
        raise PolicyError(source, problems)
    return rows, tuple(problems)


def read_policy(text: bytes) -> tuple[PolicyRows, list[Problem]]:
    """The rows that could be read, and everything that is wrong with them."""
    rows, problems = read_rows(text)
    if not rows.rules and not problems:
        problems.append(Problem(None, "the policy is empty: it has no 'p' row. To allow nobody anything, write a deny"))
    if len(rows.rules) > MAX_RULES:
        message = f"it has {len(rows.rules)} rules, more than {MAX_RULES}; write rules for roles, not for keys"
        problems.append(Problem(None, message))
    if len(rows.roles) > MAX_ROLES:
        problems.append(Problem(None, f"it declares {len(rows.roles)} roles, more than {MAX_ROLES}"))
    problems += islice(_undeclared(rows), MAX_PROBLEMS)
    problems += _depth(rows)
    if not any(p.severity == "error" for p in problems):
        problems += islice(_without_effect(rows), MAX_PROBLEMS)
    return rows, sorted(problems, key=lambda p: p.line or 0)


def _undeclared(rows: PolicyRows) -> Iterator[Problem]:
    """A deny for a misspelt role would deny nobody, so that every role has to be declared."""
    used = [(rule.line, rule.subject) for rule in rows.rules]
    used += [(binding.line, name) for binding in rows.bindings for name in (binding.subject, binding.role)]
    for line, name in used:
        if name.startswith("role:") and name not in rows.roles:
            declare = f"declare it: 'role, {name.removeprefix('role:')}'"
            yield Problem(line, f"the role {name!r} is not declared{did_you_mean(name, rows.roles)}; if it is meant, {declare}")


def _depth(rows: PolicyRows) -> Iterator[Problem]:
    """Roles are peeled off from below and then from above, a layer a step; what remains goes in circles and counts in full."""
    includes: dict[str, set[str]] = defaultdict(set)
    included_by: dict[str, set[str]] = defaultdict(set)
    last_line: dict[str, int] = {}
    for binding in rows.bindings:
        if binding.subject.startswith("role:"):
            includes[binding.subject].add(binding.role)
            included_by[binding.role].add(binding.subject)
            last_line[binding.subject] = binding.line
    core = set(includes) | set(included_by)
    layers = _peel(core, includes, included_by) + _peel(core, included_by, includes)
    steps = layers + len(core) - 1
    if steps > MAX_ROLE_DEPTH:
        circle = f" (roles that include each other: {', '.join(sorted(core)[:5])})" if core else ""
        line = max(last_line.values())
        yield Problem(line, f"a chain of roles has {steps} steps, more than {MAX_ROLE_DEPTH}{circle}; shorten it")


def _peel(roles: set[str], towards: dict[str, set[str]], back: dict[str, set[str]]) -> int:
    """Take away the roles that lead nowhere, then those that lead to these only, and so on; how often that could be done."""
    open_ends = {role: len(towards.get(role, set()) & roles) for role in roles}
    layer = [role for role, count in open_ends.items() if count == 0]
    layers = 0
    while layer:
        layers += 1
        roles.difference_update(layer)
        above = []
        for role in layer:
            for other in back.get(role, set()):
                if other in roles:
                    open_ends[other] -= 1
                    if open_ends[other] == 0:
                        above.append(other)
        layer = above
    return layers


def _without_effect(rows: PolicyRows) -> Iterator[Problem]:
    first: dict[tuple[str, ...], int] = {}
    denied = {rule.fields[:4] for rule in rows.rules if rule.effect == "deny"}
    for fields, line in [(r.fields, r.line) for r in rows.rules] + [(b.fields, b.line) for b in rows.bindings]:
        if first.setdefault(fields, line) != line:
            yield _warn(line, f"it repeats line {first[fields]}")
    for rule in rows.rules:
        if rule.effect == "deny" and rule.action == "admin":
            yield _warn(rule.line, "a deny of 'admin' denies 'generate', 'embed' and 'read' as well, since admin includes them")
        if rule.effect == "allow" and rule.fields[:4] in denied:
            yield _warn(rule.line, "it never allows anything: another rule denies the same")
        if rule.object.startswith("api/") and rule.action in ("generate", "embed"):
            yield _warn(rule.line, f"it never matches: for {rule.object!r} nobody asks {rule.action!r}, only 'read' or 'admin'")
    yield from _key_makers(rows)
    if all(rule.effect == "deny" for rule in rows.rules):
        yield _warn(None, "no rule allows anything, so that everything is denied")
    effective = _effective_roles(rows)
    for role, line in rows.roles.items():
        if role not in effective:
            yield _warn(line, f"the role {role!r} has no effect: no rule is about it or a role that it includes")


def _key_makers(rows: PolicyRows) -> Iterator[Problem]:
    """A tenant beside `admin` of keys looks as if it were a limit."""
    over_keys = [rule for rule in rows.rules if rule.action in ("admin", "*") and _matches(rule.object, _KEYS)]
    everywhere = {r.subject for r in over_keys if r.effect == "allow" and r.tenant == "*" and r.object == "**"}
    denied = {(rule.subject, rule.tenant) for rule in over_keys if rule.effect == "deny"}
    for rule in over_keys:
        if rule.effect == "deny" or rule.tenant == "*" or rule.subject in everywhere:
            continue
        if denied.isdisjoint({(rule.subject, rule.tenant), (rule.subject, "*")}):
            yield _warn(
                rule.line,
                f"it allows 'admin' on {_KEYS!r} to {rule.tenant!r}: who may administer keys may give any key any role: "
                f"tenants do not divide the admin API",
            )


def _matches(pattern: str, name: str) -> bool:
    compiled = compile_pattern(pattern)
    return compiled is not None and compiled.fullmatch(name) is not None


def _effective_roles(rows: PolicyRows) -> set[str]:
    included_by: dict[str, set[str]] = defaultdict(set)
    for binding in rows.bindings:
        included_by[binding.role].add(binding.subject)
    reached = {rule.subject for rule in rows.rules}
    todo = list(reached)
    while todo:
        new = included_by[todo.pop()] - reached
        reached |= new
        todo += new
    return reached


def _warn(line: int | None, message: str) -> Problem:
    return Problem(line, message, "warning")
