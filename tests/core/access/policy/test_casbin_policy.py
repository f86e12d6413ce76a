"""Decisions of a compiled policy: those of a plain Casbin with the whole file; roles, tenants, actions, explanations."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.access.policy.policies import BASE, ROLES, compiled, who
from inferflux_core.access.policy import casbin_policy as rbac
from inferflux_core.access.policy.casbin_policy import Decision
from inferflux_core.access.policy.match import compile_pattern
from inferflux_core.identity import ACTIONS, Action, Principal

# --- against Casbin itself --------------------------------------------------------------------------------------------

SUBJECTS = ("key:k1", "user:https://i.example|a")
RULE = st.tuples(
    st.sampled_from(("role:user", "role:admin", "role:viewer", "key:k1")),
    st.sampled_from(("*", "acme", "globex")),
    st.sampled_from(("**", "model/*", "model/**", "model/acme-*", "model/a/b", "api/keys", "api/*")),
    st.sampled_from((*ACTIONS, "*")),
    st.sampled_from(("allow", "allow", "deny")),
)
LINK = st.tuples(
    st.sampled_from((*SUBJECTS, "role:user", "role:admin", "role:viewer")),
    st.sampled_from(("role:user", "role:admin", "role:viewer")),
    st.sampled_from(("*", "acme", "globex")),
).filter(lambda link: link[0] != link[1])
Row = tuple[str, ...]
OBJECTS = ("model/acme-x", "model/a/b", "model/z", "api/keys", "api/models")


def plain_casbin(rules: Sequence[Row], links: Sequence[Row], implied: Sequence[Row]) -> Any:
    """Casbin as its manual has it: the whole policy in one enforcer, loaded by its own text adapter."""
    import casbin
    from casbin.persist.adapters.string_adapter import StringAdapter

    rows = [("p", *r) for r in rules] + [("g", *k) for k in links] + [("g2", *i) for i in implied]
    model = casbin.Model()
    model.load_model_from_text(rbac.CASBIN_MODEL)
    enforcer = casbin.Enforcer(model, StringAdapter("\n".join(", ".join(row) for row in rows)))
    patterns = {rule[2]: compile_pattern(rule[2]) for rule in rules}

    def object_matches(obj: str, pattern: str) -> bool:
        found = patterns[pattern]
        return found is not None and found.fullmatch(obj) is not None

    enforcer.add_function("objMatch", object_matches)
    assert enforcer.add_named_domain_matching_func("g", lambda asked, row: row in ("*", asked))
    enforcer.build_role_links()
    return enforcer


@settings(max_examples=60, deadline=None)
@given(
    st.lists(RULE, min_size=1, max_size=8, unique=True),
    st.lists(LINK, max_size=6, unique=True),
    st.sets(st.sampled_from(("user", "admin", "undeclared"))),
    st.booleans(),
)
def test_the_answers_are_those_of_casbin_with_the_whole_policy(
    rules: list[Row], links: list[Row], brought: set[str], embeds: bool
) -> None:
    implied: list[Row] = [("embed", "generate")] if embeds else []
    rows = [("role", "user", "admin", "viewer"), *(("p", *r) for r in rules), *(("g", *k) for k in links)]
    policy = compiled("\n".join(", ".join(row) for row in [*rows, *(("g2", *i) for i in implied)]) + "\n")
    implied += [(action, "admin") for action in ("generate", "embed", "read")]
    for tenant in ("acme", "globex", "elsewhere"):
        # What a credential brings is, to plain Casbin, a row more.
        for subject in SUBJECTS:
            claimed: list[Row] = [(subject, f"role:{role}", tenant) for role in brought if role != "undeclared"]
            oracle = plain_casbin(rules, links + claimed, implied)
            for obj, action in product(OBJECTS, ACTIONS):
                asker = Principal(subject=subject, tenant=tenant, roles=frozenset(brought))
                expected = oracle.enforce(subject, tenant, obj, action)
                assert policy.decide(asker, obj, action).allowed is expected
                explanation = policy.explain(asker, obj, action)
                denies = [text for text in explanation.matching if text.endswith("deny")]
                assert expected is (bool(explanation.matching) and not denies)


# --- roles and tenants ------------------------------------------------------------------------------------------------


def test_the_rule_that_decided_is_named_with_its_line() -> None:
    policy = compiled(BASE + "p, role:user, acme, model/x, generate, deny\n")
    version = policy.version
    allow = "line 2: p, role:user, *, model/**, generate, allow"
    deny = "line 4: p, role:user, acme, model/x, generate, deny"
    assert policy.decide(who(), "model/y", "generate") == Decision(True, allow, "casbin", version)
    assert policy.decide(who(), "model/x", "generate") == Decision(False, deny, "casbin", version)
    assert policy.decide(who(), "model/y", "read") == Decision(False, None, "casbin", version)
    assert policy.decide(who("key:k1", "globex"), "model/y", "generate") == Decision(False, None, "casbin", version)


def test_the_version_is_that_of_the_bytes() -> None:
    assert compiled(BASE).version == hashlib.sha256(BASE.encode()).hexdigest()[:16]
    assert compiled(BASE).version != compiled(BASE + "# a comment\n").version


def test_a_role_of_the_credential_counts_in_its_tenant_if_it_is_declared() -> None:
    policy = compiled(ROLES + "p, role:user, acme, model/**, generate, allow\n")
    assert policy.decide(who("user:i|a", "acme", "user"), "model/x", "generate").allowed
    assert not policy.decide(who("user:i|a", "globex", "user"), "model/x", "generate").allowed
    assert not policy.decide(who("user:i|a", "acme", "role:user"), "model/x", "generate").allowed
    assert not policy.decide(who("user:i|a", "acme", "other"), "model/x", "generate").allowed


def test_a_deny_of_any_role_wins_wherever_the_role_comes_from() -> None:
    policy = compiled(BASE + "p, role:viewer, *, model/x, generate, deny\n")
    assert policy.decide(who(), "model/x", "generate").allowed
    assert not policy.decide(who("key:k1", "acme", "viewer"), "model/x", "generate").allowed
    policy = compiled(BASE + "p, role:viewer, *, model/x, generate, deny\ng, role:user, role:viewer, acme\n")
    assert not policy.decide(who(), "model/x", "generate").allowed


def test_a_rule_about_a_key_by_name_concerns_no_other() -> None:
    policy = compiled(BASE + "g, key:k2, role:user, acme\np, key:k1, *, model/x, generate, deny\n")
    assert not policy.decide(who("key:k1"), "model/x", "generate").allowed
    assert policy.decide(who("key:k2"), "model/x", "generate").allowed


def test_admin_includes_every_action_and_none_includes_admin() -> None:
    policy = compiled(ROLES + "p, role:admin, *, **, admin, allow\np, role:user, *, **, generate, allow\ng2, embed, generate\n")

    def allowed(role: str) -> list[Action]:
        return [action for action in ACTIONS if policy.decide(who("key:k", "acme", role), "model/x", action).allowed]

    assert allowed("admin") == ["generate", "embed", "read", "admin"]
    assert allowed("user") == ["generate", "embed"]


def test_nobody_without_a_credential_is_allowed_anything() -> None:
    policy = compiled(ROLES + "p, role:user, *, **, *, allow\n")
    assert not policy.decide(Principal(roles=frozenset(("user",))), "model/x", "generate").allowed


def test_an_error_of_casbin_is_raised_and_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = compiled(BASE)
    make = rbac.make_enforcer

    def fails(*_: object) -> object:
        raise RuntimeError("broken")

    monkeypatch.setattr(rbac, "make_enforcer", fails)
    with pytest.raises(RuntimeError, match="broken"):
        policy.decide(who(), "model/x", "generate")
    monkeypatch.setattr(rbac, "make_enforcer", make)
    assert policy.decide(who(), "model/x", "generate").allowed


def test_keys_of_one_role_share_their_decisions() -> None:
    policy = compiled(BASE + "".join(f"g, key:n{i}, role:user, acme\n" for i in range(50)))
    for i in range(50):
        assert policy.decide(who(f"key:n{i}"), "model/x", "generate").allowed
        assert policy.decide(who(f"key:n{i}", "acme", f"undeclared{i}"), "model/x", "generate").allowed
    assert policy._decision.cache_info().misses == 1
    assert policy._enforcer.cache_info().currsize == 1


def test_threads_get_the_same_answers() -> None:
    policy = compiled(BASE + "p, role:user, *, model/odd-*, generate, deny\n")
    wrong: list[str] = []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait()
        for i in range(100):
            kind = "odd" if i % 2 else "even"
            if policy.decide(who(), f"model/{kind}-{i}", "generate").allowed is not (kind == "even"):
                wrong.append(f"{kind}-{i}")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_casbin_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("casbin", "casbin.enforcer", "casbin.policy", "casbin.role"):
        logging.getLogger(name).disabled = False
    with caplog.at_level(logging.DEBUG):
        compiled(BASE).decide(who(), "model/forbidden-fruit", "admin")
    assert [record for record in caplog.records if record.name.startswith("casbin")] == []


# --- explanations -----------------------------------------------------------------------------------------------------


def test_an_explanation_says_where_roles_come_from_and_what_nearly_matched() -> None:
    policy = compiled(
        BASE
        + "g, role:user, role:viewer, acme\n"
        + "p, role:viewer, *, api/models, read, allow\n"
        + "p, role:admin, *, **, admin, allow\n"
        + "p, role:user, globex, model/x, generate, deny\n"
    )
    found = asdict(policy.explain(who("key:k1", "acme", "guest"), "model/x", "generate"))
    assert found["decision"]["rule"] == "line 2: p, role:user, *, model/**, generate, allow"
    assert found["roles"] == (
        {"role": "role:guest", "via": "credential", "effective": False},
        {"role": "role:user", "via": "line 3: g, key:k1, role:user, acme", "effective": True},
        {"role": "role:viewer", "via": "line 4: g, role:user, role:viewer, acme", "effective": True},
    )
    assert found["matching"] == ("line 2: p, role:user, *, model/**, generate, allow",)
    assert found["nearest"] == (
        {"rule": "line 6: p, role:admin, *, **, admin, allow", "why": ("the subject does not have 'role:admin'",)},
        {
            "rule": "line 7: p, role:user, globex, model/x, generate, deny",
            "why": ("it is for the tenant 'globex', not 'acme'",),
        },
        {
            "rule": "line 5: p, role:viewer, *, api/models, read, allow",
            "why": ("its object 'api/models' does not match", "it is for 'read', not 'generate'"),
        },
    )
    assert found["note"] is None


@pytest.mark.parametrize(
    ("principal", "obj", "note"),
    [
        (Principal(), "model/x", "a request without a credential is allowed nothing by a policy"),
        (who("role:user"), "model/x", "a role is not a subject"),
        (who("key:k1\n"), "model/x", "the subject has a control character, or the tenant is not the name of one"),
        (who("key:k1", "*"), "model/x", "the subject has a control character, or the tenant is not the name of one"),
        (who(), "model/x\n", "'model/x\\n' is not an object; those are 'model/<name>' and 'api/<group>'"),
        (who(), "x", "'x' is not an object; those are 'model/<name>' and 'api/<group>'"),
    ],
)
def test_an_explanation_says_why_no_rule_was_asked(principal: Principal, obj: str, note: str) -> None:
    explanation = compiled(BASE).explain(principal, obj, "generate")
    assert (explanation.decision.allowed, explanation.matching, explanation.nearest, explanation.note) == (False, (), (), note)
