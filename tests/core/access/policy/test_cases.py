"""Test files of policies, and the policy and test file that are shipped as examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.access.policy.policies import BASE, compiled
from inferflux_core.access.policy.casbin_policy import Policy
from inferflux_core.access.policy.cases import PolicyCase, read_cases, run_cases
from inferflux_core.access.policy.file import PolicyError
from inferflux_core.access.policy.lint import check_policy

ASK_FOR = "ask for one 'model/<name>' or 'api/<group>', without '*'"
COMMENT = "a comment must be on a line of its own: behind a rule it would become part of its last field"
EXAMPLES = Path(__file__).parents[4] / "examples" / "policy"


def test_cases_are_read_with_their_lines() -> None:
    rows = b"\nkey:k1, acme, model/x, generate, allow\nrole:user,b,api/keys,read,deny\n"
    text = b"# questions\nsubject,tenant,object,action,expected\n" + rows
    assert read_cases(text, "tests.csv") == [
        PolicyCase("key:k1", "acme", "model/x", "generate", "allow", 4),
        PolicyCase("role:user", "b", "api/keys", "read", "deny", 5),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("key:k1,acme,model/x,generate", "a case has 5 fields (subject, tenant, object, action, expected), but this one has 4"),
        ("key:k1,*,model/x,generate,deny", "'*' is not a tenant; ask for one tenant, not for '*'"),
        ("key:k1,acme,model/*,generate,deny", "'model/*' is not an object; " + ASK_FOR),
        ("key:k1,acme,x,generate,deny", "'x' is not an object; " + ASK_FOR),
        ("key:k1,acme,model/x,write,deny", "'write' is not an action; actions are generate, embed, read, admin"),
        ("key:k1,acme,model/x,read,Deny", "'Deny' is neither 'allow' nor 'deny', in small letters"),
        ("key:k1,acme,model/x,read,deny#", COMMENT),
    ],
)
def test_a_case_that_is_refused_is_named_with_its_line(row: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read_cases(f"subject,tenant,object,action,expected\n{row}\n".encode(), "tests.csv")
    assert [str(p) for p in caught.value.problems] == [f"line 2: {message}"]
    assert caught.value.source == "tests.csv"


def test_what_fails_is_told_with_the_rule_that_decided() -> None:
    rows = [
        "key:k1,acme,model/x,generate,deny",
        "key:k1,acme,api/keys,read,allow",
        "role:usr,acme,model/x,generate,deny",
        "role:user,a,model/x,generate,allow",
    ]
    assert run_cases(compiled(BASE), read_cases("".join(f"{row}\n" for row in rows).encode(), "tests.csv")) == [
        "line 1: 'key:k1' of 'acme': generate on 'model/x' is allowed by the policy's "
        "line 2: p, role:user, *, model/**, generate, allow; expected deny",
        "line 2: 'key:k1' of 'acme': read on 'api/keys' is denied because no rule allows it; expected allow",
        "line 3: the role 'role:usr' is not declared in the policy; did you mean 'role:user'?",
    ]


def test_the_example_is_without_fault_and_passes_its_tests() -> None:
    text = (EXAMPLES / "policy.csv").read_bytes()
    assert check_policy(text) == []
    cases = read_cases((EXAMPLES / "tests.csv").read_bytes(), "tests.csv")
    assert len(cases) == 20
    assert run_cases(Policy.compile(text, "policy.csv"), cases) == []
