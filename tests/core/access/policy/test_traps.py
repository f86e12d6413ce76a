"""The traps of Casbin, one test a row of the table: what Casbin lets through, a policy of ours refuses or decides rightly."""

from __future__ import annotations

import importlib.metadata
from itertools import pairwise
from typing import Any, cast

import pytest

from core.access.policy.policies import BASE, ROLES, compiled, who
from inferflux_core.access.policy import casbin_policy as rbac
from inferflux_core.access.policy.file import PolicyError
from inferflux_core.access.policy.lint import check_policy
from inferflux_core.access.policy.match import model_matches
from inferflux_core.identity import Action, Principal


def problems_of(text: str | bytes) -> list[tuple[int | None, str, str]]:
    data = text if isinstance(text, bytes) else text.encode()
    return [(p.line, p.severity, p.message) for p in check_policy(data)]


def error_of(text: str | bytes) -> tuple[int | None, str]:
    """The only problem of a policy, which must be an error and keep it from being compiled."""
    with pytest.raises(PolicyError):
        rbac.Policy.compile(text if isinstance(text, bytes) else text.encode(), "policy.csv")
    [(line, severity, message)] = problems_of(text)
    assert severity == "error"
    return line, message


@pytest.mark.parametrize("ptype", ["P", "pp", "p2", "G", "g3", "m"])
def test_an_unknown_ptype_is_refused_with_its_line(ptype: str) -> None:
    line, message = error_of(BASE + f"{ptype}, role:user, *, model/*, generate, deny\n")
    assert (line, message.partition(" ")[0]) == (4, repr(ptype))


@pytest.mark.parametrize("effect", ["Deny", "DENY", "den", "reject"])
def test_an_effect_is_allow_or_deny(effect: str) -> None:
    line, message = error_of(BASE + f"p, role:user, *, model/*, generate, {effect}\n")
    assert (line, message) == (4, f"the effect {effect!r} is neither 'allow' nor 'deny', in small letters")


@pytest.mark.parametrize("effect", ["deny", "allow"])
def test_a_comment_behind_a_rule_is_refused(effect: str) -> None:
    line, message = error_of(BASE + f"p, role:user, *, model/*, generate, {effect} # comment\n")
    assert (line, message.split(":")[0]) == (4, "a comment must be on a line of its own")


def test_a_deny_behind_a_byte_order_mark_is_in_force() -> None:
    policy = rbac.Policy.compile(b"\xef\xbb\xbf" + f"p, role:user, *, model/x, generate, deny\n{BASE}".encode(), "policy.csv")
    assert not policy.decide(who(), "model/x", "generate").allowed
    assert policy.decide(who(), "model/y", "generate").allowed


def test_a_second_byte_order_mark_is_refused() -> None:
    line, message = error_of(b"\xef\xbb\xbf\xef\xbb\xbf# mine\n" + BASE.encode())
    assert (line, message.split(";")[0]) == (1, "it has a control character or one that cannot be seen")


def test_other_encodings_are_refused_with_the_line() -> None:
    assert error_of(BASE.encode() + b"# gr\xfc\xdfe\n") == (4, "it has a byte that is not UTF-8; save the file as UTF-8")


@pytest.mark.parametrize("row", ['p, "role:user", *, model/*, generate, deny', "p, role:user, *, 'model/*', generate, deny"])
def test_a_quoted_field_is_refused(row: str) -> None:
    assert error_of(BASE + row + "\n") == (4, "fields are not quoted; write them bare")


def test_a_misspelt_role_is_refused() -> None:
    line, message = error_of(BASE + "p, role:User, *, model/*, generate, deny\n")
    assert (line, message.split(";")[:2]) == (4, ["the role 'role:User' is not declared", " did you mean 'role:user'?"])


def test_a_misspelt_action_is_refused() -> None:
    line, message = error_of(BASE + "p, role:user, *, model/*, Generate, deny\n")
    assert (line, message.split(";")[:2]) == (4, ["'Generate' is not an action", " did you mean 'generate'?"])


def test_a_misspelt_group_of_the_api_is_refused() -> None:
    line, message = error_of(BASE + "p, role:user, *, api/key, admin, deny\n")
    assert (line, message.split(";")[:2]) == (4, ["'api/key' names no group of the API", " did you mean 'keys'?"])


def test_a_deny_of_admin_denies_what_admin_includes_and_is_warned_of() -> None:
    text = BASE + "p, role:user, *, model/x, admin, deny\n"
    assert [(line, severity) for line, severity, _ in problems_of(text) if "a deny of 'admin'" in _] == [(4, "warning")]
    assert not compiled(text).decide(who(), "model/x", "generate").allowed
    assert compiled(text).decide(who(), "model/y", "generate").allowed


@pytest.mark.parametrize(
    ("row", "count"), [("p, role:user, *, model/*, generate", 4), ("p, role:user, *, model/*, generate, allow, x", 6)]
)
def test_the_fields_of_a_rule_are_counted(row: str, count: int) -> None:
    fields = "(subject, tenant, object, action, effect)"
    assert error_of(BASE + row + "\n") == (4, f"a 'p' row has 5 fields {fields}, but this one has {count}")


def test_a_short_binding_is_refused_with_its_line() -> None:
    message = "a 'g' row has 3 fields (subject, role, tenant), but this one has 2"
    assert error_of(BASE + "g, key:k2, role:user\n") == (4, message)


def test_an_unbalanced_bracket_is_refused_with_its_line() -> None:
    line, message = error_of(BASE + "\n\ng, key:a], role:user, acme\n")
    assert (line, message.split(" ")[0]) == (6, "']'")


@pytest.mark.parametrize("text", ["", "\n# nothing\n\n", ROLES + "g, key:k1, role:user, *\n"])
def test_an_empty_policy_is_refused(text: str) -> None:
    line, message = error_of(text)
    assert (line, message.split(":")[0]) == (None, "the policy is empty")


@pytest.mark.parametrize(
    ("subject", "tenant", "obj", "action"),
    [
        ("", "acme", "model/x", "generate"),
        ("key:k1", "", "model/x", "generate"),
        ("key:k1", "*", "model/x", "generate"),
        ("key:k1", "acme", "", "generate"),
        ("key:k1", "acme", "model/", "generate"),
        ("key:k1", "acme", "model", "generate"),
        ("key:k1", "acme", "x/y", "generate"),
        ("key:k1", "acme", "model/x", ""),
        ("key:k1", "acme", "model/x", "*"),
        ("key:k1\n", "acme", "model/x", "generate"),
        ("key:k1", "acme", "model/" + "x" * 600, "generate"),
    ],
)
def test_an_empty_or_malformed_question_is_denied(subject: str, tenant: str, obj: str, action: str) -> None:
    policy = compiled(ROLES + "p, role:user, *, **, *, allow\ng, key:k1, role:user, *\n")
    assert policy.decide(who(), "model/x", "generate").allowed
    decision = policy.decide(Principal(subject=subject, tenant=tenant), obj, cast(Action, action))
    assert (decision.allowed, decision.rule) == (False, None)


def test_the_name_of_a_role_is_not_a_subject() -> None:
    policy = compiled(ROLES + "p, role:admin, *, **, admin, allow\n")
    assert policy.decide(who("key:k1", "acme", "admin"), "api/keys", "admin").allowed
    assert not policy.decide(Principal(subject="role:admin", tenant="acme"), "api/keys", "admin").allowed


def test_a_star_at_the_beginning_compares_what_comes_after_it() -> None:
    assert model_matches("*-public", "chat-public")
    assert not model_matches("*-public", "secret")


def test_patterns_are_no_regular_expressions() -> None:
    assert not model_matches("a.b", "axb")
    assert not model_matches("a", "a\n")


def test_casbins_own_matching_functions_cannot_be_reached() -> None:
    enforcer = rbac.make_enforcer([], [], [], lambda pattern, obj: False)
    assert sorted(enforcer.fm.get_functions()) == ["objMatch"]


def test_an_object_with_a_line_break_matches_nothing() -> None:
    policy = compiled(ROLES + "p, role:user, *, **, *, allow\ng, key:k1, role:user, *\n")
    for obj in ("model/x\n", "model/\nx", "model/x\u2028", "api/keys\r"):
        assert not policy.decide(who(), obj, "read").allowed


def test_a_role_for_every_tenant_is_one_in_each() -> None:
    policy = compiled(ROLES + "p, role:user, *, model/*, generate, allow\ng, key:k1, role:user, *\n")
    assert policy.decide(who("key:k1", "acme"), "model/x", "generate").allowed
    assert policy.decide(who("key:k1", "globex"), "model/x", "generate").allowed
    assert not policy.decide(who("key:k2", "acme"), "model/x", "generate").allowed


def test_without_the_function_for_tenants_no_policy_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rbac, "_tenant_matches", lambda asked, row: asked == row)
    line, message = error_of_installation()
    assert (line, message.split(";")[0]) == (None, "the installed 'pycasbin' decides otherwise than expected")


def error_of_installation() -> tuple[int | None, str]:
    with pytest.raises(PolicyError) as caught:
        compiled(BASE)
    [problem] = caught.value.problems
    return problem.line, problem.message


def test_a_distribution_called_casbin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: object())
    line, message = error_of_installation()
    assert (line, message.split(" is ")[0]) == (None, "the distribution 'casbin'")


def chain(steps: int) -> str:
    names = [f"r{i}" for i in range(steps + 1)]
    rows = [f"g, role:{a}, role:{b}, *" for a, b in pairwise(names)]
    return "\n".join(
        [f"role, {', '.join(names)}", f"p, role:r{steps}, *, model/*, generate, allow", *rows, "g, key:k1, role:r0, *\n"]
    )


def test_a_chain_of_roles_that_casbin_would_not_follow_is_refused() -> None:
    assert compiled(chain(8)).decide(who(), "model/x", "generate").allowed
    assert error_of(chain(9)) == (11, "a chain of roles has 9 steps, more than 8; shorten it")
    assert error_of(chain(15)) == (17, "a chain of roles has 15 steps, more than 8; shorten it")


def test_roles_that_include_each_other_do_no_harm() -> None:
    policy = compiled(BASE + "g, role:user, role:admin, *\ng, role:admin, role:user, acme\n")
    assert policy.decide(who(), "model/x", "generate").allowed
    assert policy.decide(who("key:k9", "acme", "admin"), "model/x", "generate").allowed


def test_casbins_switch_for_allowing_all_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import casbin

    policy = compiled(BASE)
    assert not [name for name in vars(policy) if not name.startswith("_") and "casbin" in repr(type(vars(policy)[name]))]
    initialise: Any = casbin.Enforcer._initialize

    def off(self: Any) -> None:
        initialise(self)
        self.enabled = False

    monkeypatch.setattr(casbin.Enforcer, "_initialize", off)
    assert not policy.decide(who(), "model/x", "generate").allowed
