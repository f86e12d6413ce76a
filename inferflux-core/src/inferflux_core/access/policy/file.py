"""The text of a policy file, read strictly: every line is understood as it stands or refused by its number.

Casbin's own reader passes over what it does not know, and a deny that is passed over allows. A line is one of

    # a comment, on a line of its own
    role, viewer, user                              declares roles; those not declared cannot be used
    p, role:user, acme, model/acme-*, generate, allow
    g, key:3fKq9Zt1XwYb, role:user, acme            who has a role, in which tenant (`*`: in every one)
    g, role:admin, role:user, *                     a role that includes another
    g2, embed, generate                             whoever may generate may embed; admin includes all without being told

Fields are separated by commas and cannot be quoted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NoReturn, cast

from inferflux_core.access.policy.match import compile_pattern, is_plain, pattern_problem
from inferflux_core.errors import ConfigError
from inferflux_core.identity import ACTIONS, ANONYMOUS, TENANT, Action

MAX_POLICY_BYTES = 1024 * 1024
MAX_PROBLEMS = 100
API_GROUPS = (
    "audit",
    "cache",
    "config",
    "health",
    "keys",
    "limits",
    "metrics",
    "models",
    "openapi",
    "policy",
    "pools",
    "routing",
)
"""The groups of the HTTP API that policies name as `api/<group>`."""

_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_KEY = re.compile(r"key:[A-Za-z0-9._-]{1,64}")
_USER = re.compile(r"user:[^|\s]+\|\S(?:.{0,510}\S)?")
_FIELDS = {
    "p": ("subject", "tenant", "object", "action", "effect"),
    "g": ("subject", "role", "tenant"),
    "g2": ("action", "action"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a policy or its test file. `line` counts from 1; None is the file as a whole."""

    line: int | None
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = "" if self.line is None else f"line {self.line}: "
        return f"{where}{'warning: ' if self.severity == 'warning' else ''}{self.message}"


class PolicyError(ConfigError):
    """A policy that is not taken, with everything that is wrong with it."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        errors = [str(p) for p in self.problems if p.severity == "error"]
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        super().__init__(f"The policy {source!r} is refused:\n  " + "\n  ".join(errors[:10]) + more)


@dataclass(frozen=True, slots=True)
class Rule:
    """A `p` row: whom of which tenant it allows or denies what."""

    line: int
    subject: str
    tenant: str
    object: str
    action: Action | Literal["*"]
    effect: Literal["allow", "deny"]

    @property
    def fields(self) -> tuple[str, str, str, str, str]:
        return (self.subject, self.tenant, self.object, self.action, self.effect)

    def __str__(self) -> str:
        return f"line {self.line}: p, {', '.join(self.fields)}"


@dataclass(frozen=True, slots=True)
class Binding:
    """A `g` row: who has a role in which tenant."""

    line: int
    subject: str
    role: str
    tenant: str

    @property
    def fields(self) -> tuple[str, str, str]:
        return (self.subject, self.role, self.tenant)

    def __str__(self) -> str:
        return f"line {self.line}: g, {', '.join(self.fields)}"


@dataclass(frozen=True, slots=True)
class Implication:
    """A `g2` row: a permission for `by` is one for `action` too."""

    line: int
    action: Action
    by: Action


@dataclass(slots=True)
class PolicyRows:
    """The rows of a file. Roles are named as in rules, `role:<name>`, with the line that declares them."""

    rules: list[Rule] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    implications: list[Implication] = field(default_factory=list)
    roles: dict[str, int] = field(default_factory=dict)


class _Refused(Exception):
    """Why a line is refused."""


def decode_lines(text: bytes) -> tuple[list[str], list[Problem]]:
    """The lines of a policy or test file. A byte order mark at its beginning is dropped; CR LF ends a line as LF does."""
    if len(text) > MAX_POLICY_BYTES:
        return [], [Problem(None, f"it has more than {MAX_POLICY_BYTES} bytes, the most that is read")]
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return [], [Problem(text.count(b"\n", 0, error.start) + 1, "it has a byte that is not UTF-8; save the file as UTF-8")]
    if decoded and not decoded.endswith("\n"):
        # Cut off in the middle, `g, key:k1, role:user, acme-eu` may well read `g, key:k1, role:user, acme`.
        line = decoded.count("\n") + 1
        return [], [Problem(line, "the last line does not end; the file may be half-written. End it with a line break")]
    return [line.removesuffix("\r") for line in decoded.split("\n")[:-1]], []


def split_fields(line: str) -> list[str]:
    """The fields of a line, empty for a comment or a blank line.

    Raises:
        ValueError: the line has what this format does not have; the message says what.
    """
    if not is_plain(line.replace("\t", " ")):
        raise ValueError("it has a control character or one that cannot be seen; write the line anew")
    stripped = line.strip(" \t")
    if not stripped or stripped.startswith("#"):
        return []
    if "#" in stripped:
        raise ValueError("a comment must be on a line of its own: behind a rule it would become part of its last field")
    fields = [part.strip(" \t") for part in stripped.split(",")]
    if '"' in stripped or any(part[:1] in "'`" or part[-1:] in "'`" for part in fields if part):
        raise ValueError("fields are not quoted; write them bare")
    if (bracket := re.search(r"[\[\](){}]", stripped)) is not None:
        raise ValueError(f"{bracket[0]!r} has no meaning in a policy and is refused; bind such a subject by a role it brings")
    if "" in fields:
        raise ValueError(f"field {fields.index('') + 1} is empty")
    return fields


def read_rows(text: bytes) -> tuple[PolicyRows, list[Problem]]:
    """The rows that could be read, and every line that could not."""
    lines, problems = decode_lines(text)
    rows = PolicyRows()
    for number, line in enumerate(lines, start=1):
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(None, f"more than {MAX_PROBLEMS} lines are wrong; the rest was not read"))
            break
        try:
            fields = split_fields(line)
            if fields:
                _add(rows, number, fields)
        except (ValueError, _Refused) as error:
            problems.append(Problem(number, str(error)))
    return rows, problems


def _add(rows: PolicyRows, line: int, fields: list[str]) -> None:
    ptype, *values = fields
    if ptype == "role":
        if not values:
            _refuse("'role' declares roles, but names none: 'role, viewer, user'")
        for name in values:
            if name.startswith("role:") or _ROLE.fullmatch(name) is None:
                _refuse(f"{name!r} is not the name of a role; use letters, digits and '._:/@-', without 'role:' before it")
            rows.roles.setdefault(f"role:{name}", line)
        return
    expected = _FIELDS.get(ptype)
    if expected is None:
        _refuse(f"{ptype!r} begins no row; a row begins with 'role', 'p', 'g' or 'g2', in small letters")
    if len(values) != len(expected):
        _refuse(f"a {ptype!r} row has {len(expected)} fields ({', '.join(expected)}), but this one has {len(values)}")
    if ptype == "p":
        subject, tenant, obj, action, effect = values
        _check_subject(subject)
        _check_tenant(tenant)
        if (problem := object_problem(obj)) is not None:
            _refuse(problem)
        if effect not in ("allow", "deny"):
            _refuse(f"the effect {effect!r} is neither 'allow' nor 'deny', in small letters")
        known = "*" if action == "*" else _action(action)
        rows.rules.append(Rule(line, subject, tenant, obj, known, cast('Literal["allow", "deny"]', effect)))
    elif ptype == "g":
        subject, role, tenant = values
        _check_subject(subject)
        if not role.startswith("role:"):
            _refuse(f"{role!r} is not a role; name it 'role:<name>'")
        _check_subject(role)
        _check_tenant(tenant)
        if subject == role:
            _refuse(f"{role!r} is bound to itself")
        rows.bindings.append(Binding(line, subject, role, tenant))
    else:
        implied, by = _action(values[0]), _action(values[1])
        if implied == "admin" and by != "admin":
            _refuse(f"{by!r} must not imply 'admin': name those who may administer in a 'p' row")
        rows.implications.append(Implication(line, implied, by))


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _check_subject(subject: str) -> None:
    kind, _, rest = subject.partition(":")
    if kind == "role" and _ROLE.fullmatch(rest) is not None:
        return
    if _KEY.fullmatch(subject) is not None or _USER.fullmatch(subject) is not None:
        return
    if subject == ANONYMOUS:
        _refuse(f"{ANONYMOUS!r} cannot be given anything by a policy; without credentials nobody is known")
    _refuse(f"{subject!r} is not a subject; use 'role:<name>', 'key:<id>' or 'user:<issuer>|<sub>'")


def is_tenant(text: str) -> bool:
    return TENANT.fullmatch(text) is not None


def _check_tenant(tenant: str) -> None:
    if tenant != "*" and not is_tenant(tenant):
        _refuse(f"{tenant!r} is not a tenant; use letters, digits and '._-', at most 64, or '*' for every tenant")


def _action(text: str) -> Action:
    if text not in ACTIONS:
        _refuse(f"{text!r} is not an action{did_you_mean(text, ACTIONS)}; actions are {', '.join(ACTIONS)}")
    return text


def object_problem(pattern: str) -> str | None:
    """Why an object pattern is refused; None if it is not. One that can match nothing is refused as well."""
    kind, _, name = pattern.partition("/")
    if pattern == "**":
        return None
    if kind not in ("model", "api") or not name:
        return f"{pattern!r} is not an object; use 'model/<name>', 'api/<group>' or '**' for everything"
    if (problem := pattern_problem(pattern)) is not None:
        return f"the object {pattern!r} {problem}"
    compiled = compile_pattern(name)
    if kind == "api" and (compiled is None or not any(map(compiled.fullmatch, API_GROUPS))):
        return f"{pattern!r} names no group of the API{did_you_mean(name, API_GROUPS)}; groups are {', '.join(API_GROUPS)}"
    return None


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` if something close is among the choices, else nothing."""
    choices = list(choices)
    close = [c for c in choices if c.lower() == text.lower()] or difflib.get_close_matches(text, choices[:200], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
