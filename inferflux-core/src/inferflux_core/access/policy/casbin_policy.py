"""Role-based access control: a policy file compiled for Casbin, and its decisions.

A decision goes through two tables. The first finds the *standing* of a principal: its tenant, the roles that it has at once (by
`g` rows of its tenant or `*`, and by its credential), and its own name where a rule is about it. The second holds decisions by
standing, object and action, so that all keys of a role share them. What neither holds is asked of Casbin, which gets only the
rules that can concern this standing and this object: it interprets each rule anew for each question, which takes some 7 µs.

    principal -> standing -> decision
                    |            |
                  g rows     Casbin: the standing's p rows, g rows and g2 rows

All of a principal's roles are judged together: any deny that matches wins. Nothing is allowed without an allow rule that Casbin
names and the file has, so that Casbin's switch for `allow all` and its answer to an empty policy do not open anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from inferflux_core.access.policy.file import Binding, PolicyError, PolicyRows, Problem, Rule, is_tenant
from inferflux_core.access.policy.lint import parse_policy
from inferflux_core.access.policy.match import MAX_OBJECT_CHARS, compile_pattern, is_plain
from inferflux_core.identity import ACTIONS, ANONYMOUS, Action, Principal

if TYPE_CHECKING:
    from inferflux_core.access.policy.explain import Explanation

CACHED_DECISIONS = 65_536
CACHED_MODELS = 1024

CASBIN_MODEL = """
[request_definition]
r = sub, tenant, obj, act
[policy_definition]
p = sub, tenant, obj, act, eft
[role_definition]
g = _, _, _
g2 = _, _
[policy_effect]
e = some(where (p.eft == allow)) && !some(where (p.eft == deny))
[matchers]
m = (p.tenant == "*" || r.tenant == p.tenant) && (p.act == "*" || r.act == p.act || g2(r.act, p.act)) && \
objMatch(r.obj, p.obj) && g(r.sub, p.sub, r.tenant)
"""
"""The model of policies. The parts of the matcher stand in the order of what they cost."""

# Stand for all subjects that no rule names, and all tenants that no row names. Neither can be written in a policy.
_ANYONE = "?"
_ELSEWHERE = "?"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether something is allowed, and why.

    Attributes:
        rule: the rule that decided, with its line; None if none matched, which denies.
        engine: what decided.
        version: of the policy.
    """

    allowed: bool
    rule: str | None
    engine: str
    version: str


@dataclass(frozen=True, slots=True)
class Standing:
    """All that a policy needs to know about a principal. Equal standings get equal decisions.

    Attributes:
        roles: those that the subject has at once, as `role:<name>`; what they include comes on top.
        subject: its name if a rule is about it by name.
    """

    tenant: str
    roles: frozenset[str]
    subject: str | None


class Policy:
    """A policy file, compiled. It never changes; a change of the file makes a new one.

    Attributes:
        version: the first 16 hex digits of the SHA-256 of the file's bytes.
        text: the file's bytes.
        rows: what the file says.
        warnings: what is allowed in a policy, but hardly meant.
    """

    def __init__(self, text: bytes, rows: PolicyRows, warnings: tuple[Problem, ...]) -> None:
        self.version = version_of(text)
        self.text = text
        self.rows = rows
        self.warnings = warnings
        self._patterns = {r.object: compile_pattern(r.object) for r in rows.rules}
        self._rules_of: dict[str, list[Rule]] = defaultdict(list)
        for rule in rows.rules:
            self._rules_of[rule.subject].append(rule)
        self._bindings_of: dict[str, list[Binding]] = defaultdict(list)
        for binding in rows.bindings:
            self._bindings_of[binding.subject].append(binding)
        self._tenants = {r.tenant for r in rows.rules} | {b.tenant for b in rows.bindings}
        self._implied = [(i.action, i.by) for i in rows.implications]
        self._implied += [(action, "admin") for action in ACTIONS if action != "admin"]
        # Each table is safe to use from several threads. They refer to this object and are freed with it.
        self._standing = lru_cache(maxsize=CACHED_DECISIONS)(self._find_standing)
        self._decision = lru_cache(maxsize=CACHED_DECISIONS)(self._ask)
        self._enforcer = lru_cache(maxsize=CACHED_MODELS)(self._build_enforcer)
        self._answers: dict[Rule | None, Decision] = {}
        # An enforcer is given the rules that concern a question, and fills tables of its own while it answers.
        self._casbin_lock = threading.Lock()

    @classmethod
    def compile(cls, text: bytes, source: str) -> Policy:
        """Check and compile a policy. Takes some milliseconds for 1,000 rows, and 0.1 s more the first time.

        Args:
            source: what messages call the file.

        Raises:
            PolicyError: with everything that is wrong.
        """
        rows, warnings = parse_policy(text, source)
        policy = cls(text, rows, warnings)
        _check_installation(source)
        return policy

    def decide(self, principal: Principal, obj: str, action: Action) -> Decision:
        """Whether a principal may do something to an object such as `model/demo` or `api/keys`.

        Whatever is not a well-formed question is denied: nobody's name, a role's name as subject, an unknown action, an object
        with control characters. An anonymous principal is denied everything. What Casbin raises is raised, and not remembered.
        """
        standing = self._standing(principal.subject, principal.roles, principal.tenant)
        if standing is None or len(obj) > MAX_OBJECT_CHARS or action not in ACTIONS:
            return self._answer(None)
        return self._decision(standing, obj, action)

    def explain(self, principal: Principal, obj: str, action: Action) -> Explanation:
        """The decision, the roles it rests on and where they come from, and the rules that nearly matched."""
        from inferflux_core.access.policy.explain import explain

        return explain(self, principal, obj, action)

    def bindings_of(self, subject: str, tenant: str) -> list[Binding]:
        """The `g` rows that give a subject or role a role in a tenant."""
        return [b for b in self._bindings_of.get(subject, ()) if b.tenant in ("*", tenant)]

    def object_matches(self, pattern: str, obj: str) -> bool:
        """Whether an object matches the pattern of one of this policy's rules."""
        compiled = self._patterns[pattern]
        return compiled is not None and compiled.fullmatch(obj) is not None

    def implies(self, by: str, action: str) -> bool:
        """Whether a rule for the action `by` is one for another action."""
        reached, todo = {by}, [by]
        while todo:
            current = todo.pop()
            new = {a for a, b in self._implied if b == current} - reached
            reached |= new
            todo += new
        return by == "*" or action in reached

    def roles_of(self, standing: Standing) -> dict[str, Binding | None]:
        """All roles of a standing, and the row that gave each; None for those that it has at once."""
        found: dict[str, Binding | None] = dict.fromkeys(sorted(standing.roles))
        todo = list(found)
        for role in todo:
            for binding in self.bindings_of(role, standing.tenant):
                if binding.role not in found:
                    found[binding.role] = binding
                    todo.append(binding.role)
        return found

    def _find_standing(self, subject: str, roles: frozenset[str], tenant: str) -> Standing | None:
        if not subject or subject == ANONYMOUS or subject.startswith("role:") or not is_plain(subject) or not is_tenant(tenant):
            return None
        direct = {f"role:{role}" for role in roles} & self.rows.roles.keys()
        direct |= {binding.role for binding in self.bindings_of(subject, tenant)}
        known = tenant if tenant in self._tenants else _ELSEWHERE
        return Standing(known, frozenset(direct), subject if subject in self._rules_of else None)

    def _ask(self, standing: Standing, obj: str, action: Action) -> Decision:
        kind, _, name = obj.partition("/")
        if kind not in ("model", "api") or not name or not is_plain(obj):
            return self._answer(None)
        matching = {pattern for pattern in self._patterns if self.object_matches(pattern, obj)}
        with self._casbin_lock:
            enforcer, rules = self._enforcer(standing)
            concerned = [list(fields) for fields, rule in rules.items() if rule.object in matching]
            if not concerned:
                return self._answer(None)  # to a policy without rules Casbin says yes if a field of the request is empty
            enforcer.get_model()["p"]["p"].policy = concerned
            allowed, fields = enforcer.enforce_ex(standing.subject or _ANYONE, standing.tenant, obj, action)
        rule = rules.get(tuple(fields))
        if rule is None or (allowed is True) != (rule.effect == "allow"):
            return self._answer(None)
        return self._answer(rule)

    def _answer(self, rule: Rule | None) -> Decision:
        decision = self._answers.get(rule)
        if decision is None:
            text = None if rule is None else str(rule)
            decision = Decision(rule is not None and rule.effect == "allow", text, "casbin", self.version)
            self._answers[rule] = decision
        return decision

    def _build_enforcer(self, standing: Standing) -> tuple[Any, dict[tuple[str, ...], Rule]]:
        """A Casbin enforcer with the roles of one standing, and the standing's rules by their fields."""
        subject = standing.subject or _ANYONE
        roles = self.roles_of(standing)
        rules: dict[tuple[str, ...], Rule] = {}
        for name in (subject, *roles):
            for rule in self._rules_of.get(name, ()):
                if rule.tenant in ("*", standing.tenant):
                    rules.setdefault(rule.fields, rule)
        links = {(subject, role, standing.tenant) for role in standing.roles}
        links |= {b.fields for role in roles for b in self.bindings_of(role, standing.tenant)}
        return make_enforcer((), sorted(links), self._implied, self.object_matches), rules


def version_of(text: bytes) -> str:
    """The version of a policy file with this content."""
    return hashlib.sha256(text).hexdigest()[:16]


def make_enforcer(
    rules: Iterable[tuple[str, ...]],
    links: Iterable[tuple[str, ...]],
    implied: Iterable[tuple[str, ...]],
    match: Callable[[str, str], bool],
) -> Any:
    """A plain Casbin enforcer with these `p`, `g` and `g2` rows. It must not be used by two threads at once.

    Args:
        match: called with a rule's object and the one asked for; besides `g` and `g2` the only function of the matcher.
    """
    import casbin
    from casbin.model import FunctionMap

    for name in ("casbin", "casbin.enforcer", "casbin.policy", "casbin.role"):
        logging.getLogger(name).disabled = True  # they write requests as they came, line breaks included
    model = casbin.Model()
    model.load_model_from_text(CASBIN_MODEL)
    model["p"]["p"].policy.extend(list(row) for row in rules)
    model["g"]["g"].policy.extend(list(row) for row in links)
    model["g"]["g2"].policy.extend(list(row) for row in implied)
    enforcer = casbin.Enforcer(model)
    enforcer.fm = FunctionMap()  # without keyMatch and its kin, which match more than they seem to
    enforcer.fm.add_function("objMatch", lambda obj, pattern: match(pattern, obj))
    if not enforcer.add_named_domain_matching_func("g", _tenant_matches):
        raise RuntimeError("Casbin did not take the function that compares tenants")
    enforcer.build_role_links()
    return enforcer


def _tenant_matches(asked: str, row: str) -> bool:
    return row in ("*", asked)


def _check_installation(source: str) -> None:
    """Refuse a Casbin that does not decide as this module relies on.

    Raises:
        PolicyError: with the cause.
    """
    try:
        importlib.metadata.distribution("casbin")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        cure = "run 'pip uninstall casbin pycasbin', then 'pip install pycasbin'"
        message = f"the distribution 'casbin' is installed and overwrites 'pycasbin', its successor; {cure}"
        raise PolicyError(source, [Problem(None, message)])
    rules = [("role:a", "*", "model/a", "admin", "allow"), ("role:b", "t", "model/a", "read", "deny")]
    links = [("x", "role:a", "*"), ("y", "role:a", "*"), ("y", "role:b", "t")]
    enforcer = make_enforcer(rules, links, [("read", "admin")], lambda pattern, obj: pattern == obj)
    allowed = (("x", "t", "read"), ("x", "u", "admin"), ("y", "u", "read"))
    denied = (("y", "t", "read"), ("x", "t", "embed"), ("z", "t", "read"))
    answers = [enforcer.enforce(subject, tenant, "model/a", action) for subject, tenant, action in (*allowed, *denied)]
    if answers != [True] * len(allowed) + [False] * len(denied):
        message = "the installed 'pycasbin' decides otherwise than expected; install the version that inferflux-core asks for"
        raise PolicyError(source, [Problem(None, message)])
