"""What the reader of policies takes, what it refuses and what it warns of. The traps of Casbin are in test_traps.py."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.access.policy.policies import BASE, ROLES, compiled
from inferflux_core.access.policy.file import MAX_POLICY_BYTES, MAX_PROBLEMS, PolicyError, Problem, read_rows
from inferflux_core.access.policy.lint import check_policy

NO_ROLE = "is not the name of a role; use letters, digits and '._:/@-', without 'role:' before it"
NO_SUBJECT = "is not a subject; use 'role:<name>', 'key:<id>' or 'user:<issuer>|<sub>'"
NO_TENANT = "is not a tenant; use letters, digits and '._-', at most 64, or '*' for every tenant"
NO_OBJECT = "is not an object; use 'model/<name>', 'api/<group>' or '**' for everything"
INVISIBLE = "it has a control character or one that cannot be seen; write the line anew"

KEY_MAKER = (
    "line 5: warning: it allows 'admin' on 'api/keys' to 'acme': who may administer keys may give any key any role: "
    "tenants do not divide the admin API"
)


def check(text: str) -> list[str]:
    return [str(problem) for problem in check_policy(text.encode())]


def test_comments_blank_lines_spaces_and_both_line_ends_are_read() -> None:
    comments = "# a, b [c] \"d\" 'e'\r\n\n\t  # more\n"
    text = comments + "role,user , admin\r\np,role:user,*,model/My Model,generate,allow\n  g , key:k1 , role:user , *\n"
    rows, problems = read_rows(text.encode())
    assert problems == []
    assert rows.roles == {"role:user": 4, "role:admin": 4}
    assert [str(row) for row in (*rows.rules, *rows.bindings)] == [
        "line 5: p, role:user, *, model/My Model, generate, allow",
        "line 6: g, key:k1, role:user, *",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("role", "'role' declares roles, but names none: 'role, viewer, user'"),
        ("role, role:user", "'role:user' " + NO_ROLE),
        ("role, a b", "'a b' " + NO_ROLE),
        ("g, k1, role:user, *", "'k1' " + NO_SUBJECT),
        ("g, user:a, role:user, *", "'user:a' " + NO_SUBJECT),
        ("g, key:*, role:user, *", "'key:*' " + NO_SUBJECT),
        ("g, anonymous, role:user, *", "'anonymous' cannot be given anything by a policy; without credentials nobody is known"),
        ("g, key:k1, user, *", "'user' is not a role; name it 'role:<name>'"),
        ("g, role:user, role:user, *", "'role:user' is bound to itself"),
        ("g, key:k1, role:user, a b", "'a b' " + NO_TENANT),
        ("g, key:k1, role:user, acme-*", "'acme-*' " + NO_TENANT),
        ("g, key:k1, , *", "field 3 is empty"),
        ("g2, admin, read", "'read' must not imply 'admin': name those who may administer in a 'p' row"),
        ("g2, *, read", "'*' is not an action; actions are generate, embed, read, admin"),
        ("p, role:user, *, *, read, deny", "'*' " + NO_OBJECT),
        ("p, role:user, *, model/, read, deny", "'model/' " + NO_OBJECT),
        ("p, role:user, *, Model/x, read, deny", "'Model/x' " + NO_OBJECT),
        ("p, role:user, *, model//x, read, deny", "the object 'model//x' has an empty segment or a space at an end"),
        (
            "p, role:user, *, model/***, read, deny",
            "the object 'model/***' has more than two '*' in a row; '*' matches within one segment, '**' across segments",
        ),
        ("p, role:user\x00, *, model/x, read, deny", INVISIBLE),
        ("p, role:user, *, model/\u200bx, read, deny", INVISIBLE),
        ("p, role:user, *, model/x, read\rdeny", INVISIBLE),
    ],
)
def test_a_line_that_is_refused_is_named_with_the_cause(row: str, message: str) -> None:
    assert check(f"{BASE}\n{row}\n") == [f"line 5: {message}"]


def test_all_that_is_wrong_is_reported_at_once_in_the_order_of_lines() -> None:
    text = "p, role:nobody, *, model/x, read, deny\nx\n" + BASE + "g, key:k1, role:usre, *\n"
    assert check(text) == [
        "line 1: the role 'role:nobody' is not declared; if it is meant, declare it: 'role, nobody'",
        "line 2: 'x' begins no row; a row begins with 'role', 'p', 'g' or 'g2', in small letters",
        "line 6: the role 'role:usre' is not declared; did you mean 'role:user'?; if it is meant, declare it: 'role, usre'",
    ]
    with pytest.raises(PolicyError) as caught:
        compiled(text)
    assert [p.line for p in caught.value.problems] == [1, 2, 6]
    assert str(caught.value).splitlines()[:2] == [
        "The policy 'policy.csv' is refused:",
        "  line 1: the role 'role:nobody' is not declared; if it is meant, declare it: 'role, nobody'",
    ]


def test_a_file_that_ends_within_a_line_is_refused() -> None:
    """Whoever reads half of `acme-eu` binds the key to another tenant."""
    cure = "the last line does not end; the file may be half-written. End it with a line break"
    assert check(BASE + "g, key:k2, role:user, acme") == [f"line 4: {cure}"]


def test_a_file_too_large_is_refused_unread() -> None:
    assert check("#" * MAX_POLICY_BYTES + "\n") == ["it has more than 1048576 bytes, the most that is read"]


def test_a_file_of_nonsense_is_refused_before_long() -> None:
    begun = time.perf_counter()
    problems = check("x\n" * 400_000)
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[0] == f"more than {MAX_PROBLEMS} lines are wrong; the rest was not read"
    assert len(check("role, user\n" + "g, key:k1, role:usre, *\n" * 20_000)) == MAX_PROBLEMS + 1
    assert time.perf_counter() - begun < 5.0


@pytest.mark.parametrize(
    ("rows", "warnings"),
    [
        ("", []),
        ("g, key:k1, role:user, acme\n", ["line 5: warning: it repeats line 3"]),
        (
            "p, role:user, *, model/**, generate, deny\n",
            ["line 2: warning: it never allows anything: another rule denies the same"],
        ),
        (
            "p, role:user, *, api/keys, generate, allow\n",
            ["line 5: warning: it never matches: for 'api/keys' nobody asks 'generate', only 'read' or 'admin'"],
        ),
        (
            "role, extra\n",
            ["line 5: warning: the role 'role:extra' has no effect: no rule is about it or a role that it includes"],
        ),
        ("role, extra\ng, role:extra, role:user, globex\n", []),
        ("p, role:user, acme, api/keys, admin, allow\n", [KEY_MAKER]),
        ("p, role:user, acme, api/*, *, allow\n", [KEY_MAKER]),
        ("p, role:user, acme, **, admin, allow\n", [KEY_MAKER]),
        ("p, role:user, acme, api/keys, read, allow\np, role:user, acme, api/limits, admin, allow\n", []),
        ("p, role:user, *, api/keys, admin, allow\n", []),
        ("p, role:user, acme, api/*, admin, allow\np, role:user, *, **, admin, allow\n", []),
        (
            "p, role:user, acme, model/**, admin, allow\np, role:user, acme, api/*, admin, allow\n",
            [KEY_MAKER.replace("5", "6")],
        ),
    ],
)
def test_what_is_hardly_meant_is_warned_of(rows: str, warnings: list[str]) -> None:
    text = BASE.replace(ROLES, "role, user\n") + "g2, embed, generate\n" + rows
    assert check(text) == warnings
    assert [str(p) for p in compiled(text).warnings] == warnings


def test_a_tenant_whose_administrators_may_not_touch_keys_is_fine() -> None:
    base = BASE.replace(ROLES, "role, user\n")
    for tenant in ("acme", "*"):
        deny = f"p, role:user, {tenant}, api/keys, admin, deny\n"
        found = check(base + "p, role:user, acme, api/*, admin, allow\n" + deny)
        assert [line for line in found if "may give any key" in line] == []
    found = check(base + "p, role:user, acme, api/*, admin, allow\np, role:user, globex, api/keys, admin, deny\n")
    assert KEY_MAKER.replace("5", "4") in found


def test_a_policy_of_denies_only_is_warned_of() -> None:
    text = "role, user\np, role:user, *, **, *, deny\n"
    assert check(text) == ["warning: no rule allows anything, so that everything is denied"]


def test_roles_that_lead_into_a_circle_are_not_counted_as_a_chain() -> None:
    names = [f"r{i}" for i in range(20)]
    rows = "".join(f"g, role:{name}, role:user, *\n" for name in names)
    circle = "g, role:user, role:admin, *\ng, role:admin, role:user, *\n"
    assert check(f"role, {', '.join(names)}\n{BASE.replace(', viewer', '')}{circle}{rows}") == []


LINES = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(
                ("p", "g", "g2", "role", "role:a", "a", "key:k", "*", "model/x", "read", "allow", "", "#", "[", '"')
            ),
            max_size=8,
        ).map(", ".join),
    ),
    max_size=12,
)


@given(LINES)
def test_any_text_is_either_understood_in_full_or_refused_with_real_lines(lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    data = text.encode("utf-8", "surrogatepass")
    problems = check_policy(data)
    count = data.count(b"\n")
    assert all(p.line is None or 1 <= p.line <= count for p in problems)
    if not any(p.severity == "error" for p in problems):
        rows, _ = read_rows(data)
        meant = [line for line in text.split("\n") if line.strip(" \t\r") and not line.strip(" \t").startswith("#")]
        declaring = [line for line in meant if line.strip(" \t").startswith("role")]
        assert len(rows.rules) + len(rows.bindings) + len(rows.implications) == len(meant) - len(declaring)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_an_accident(data: bytes) -> None:
    assert all(isinstance(problem, Problem) for problem in check_policy(data))
