"""`inferctl admin policy`: checking and testing a policy file here or on the server, and putting one in force."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from inferflux_core.cli.admin.admin_client import ask
from inferflux_core.cli.api_errors import printable
from inferflux_core.cli.server_options import Server, print_json, server_command
from inferflux_core.cli.table import cell, print_table
from inferflux_core.identity import ACTIONS

PATH = "/v1/admin/policy"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def policy() -> None:
    """The policy file of the server."""


@policy.command()
@server_command
def show(server: Server, /) -> None:
    """Print the policy in force, and on stderr its version and why the file as it is now is not in force."""
    with server.connect() as client:
        shown = ask(client, "GET", PATH).document
    if server.as_json:
        print_json(shown)
        return
    click.echo(printable(shown["policy"]), nl=False)
    click.echo(f"# version {shown['version']}", err=True)
    for problem in shown["file_problems"] or ():
        click.echo(f"# not in force: {_problem(problem)}", err=True)


@policy.command()
@click.argument("file", type=_FILE)
@click.option("--on-server", is_flag=True, help="Ask the server, which also runs its tests and says what would change.")
@server_command
def check(server: Server, /, file: Path, on_server: bool) -> None:
    """Check a policy FILE without putting it in force. Exit code 1 if it has errors.

    --json prints {"ok","version","problems":[{"line","message","severity"}],"added","removed"}.
    """
    if on_server:
        with server.connect() as client:
            answer = ask(client, "POST", f"{PATH}/check", text=file.read_bytes()).document
    else:
        answer = _checked_here(file)
    if server.as_json:
        print_json(answer)
    else:
        for problem in answer["problems"]:
            click.echo(f"{file}: {_problem(problem)}")
        for sign, rows in (("+", answer["added"]), ("-", answer["removed"])):
            for row in rows:
                click.echo(f"{sign} {printable(row)}")
        click.echo(f"{'ok' if answer['ok'] else 'refused'}: version {answer['version']}")
    if not answer["ok"]:
        sys.exit(1)


@policy.command()
@click.argument("file", type=_FILE, required=False)
@click.option("--cases", type=_FILE, help="Test file. [default: tests.csv beside FILE; without FILE the server's own]")
@server_command
def test(server: Server, /, file: Path | None, cases: Path | None) -> None:
    """Run test cases: against a policy FILE on this machine, or without one against the policy in force on the server.

    Exit code 1 if one fails. --json prints {"ok","version","cases","failures"}.
    """
    if file is not None:
        answer = _tested_here(file, cases or file.with_name("tests.csv"))
    else:
        body = {} if cases is None else {"cases": _text(cases)}
        with server.connect() as client:
            answer = ask(client, "POST", f"{PATH}/test", body).document
    if server.as_json:
        print_json(answer)
    else:
        for failure in answer["failures"]:
            click.echo(printable(failure))
        count = "the server's cases" if answer["cases"] is None else f"{answer['cases']} cases"
        verdict = "ok" if answer["ok"] else f"{len(answer['failures'])} failed"
        click.echo(f"{verdict}: {count}, version {answer['version']}")
    if not answer["ok"]:
        sys.exit(1)


@policy.command()
@click.argument("obj", metavar="OBJECT")
@click.argument("action", type=click.Choice(ACTIONS))
@click.option("--key", help="Id of an API key.")
@click.option("--subject", help="user:<issuer>|<sub> or key:<id>, as the audit log has it.")
@click.option("--role", "roles", multiple=True, help="Role that the subject's credential brings. Repeatable.")
@click.option("--tenant", help="The subject's tenant.")
@server_command
def explain(
    server: Server,
    /,
    obj: str,
    action: str,
    key: str | None,
    subject: str | None,
    roles: tuple[str, ...],
    tenant: str | None,
) -> None:
    """Say why somebody may do ACTION on OBJECT (model/<name> or api/<group>), or not. Exit code 1 if not."""
    if (key is None) == (subject is None):
        raise click.UsageError("give either --key or --subject")
    if key is not None and (roles or tenant is not None):
        raise click.UsageError("--role and --tenant belong to --subject; a key has its own")
    body: dict[str, Any] = {"object": obj, "action": action}
    body |= {"key": key} if key is not None else {"subject": subject, "roles": list(roles)}
    if tenant is not None:
        body["tenant"] = tenant
    with server.connect() as client:
        answer = ask(client, "POST", f"{PATH}/explain", body).document
    if server.as_json:
        print_json(answer)
    else:
        _print_explanation(answer)
    if not answer["allowed"]:
        sys.exit(1)


@policy.command()
@server_command
def reload(server: Server, /) -> None:
    """Let the server look at its policy file now. Exit code 1 if the file is refused."""
    with server.connect() as client:
        answer = ask(client, "POST", f"{PATH}/reload").document
    _print_version(server, answer)


@policy.command("set")
@click.argument("file", type=_FILE)
@click.option("--expect", metavar="VERSION", help="Version that it replaces. [default: the one in force now]")
@server_command
def set_policy(server: Server, /, file: Path, expect: str | None) -> None:
    """Put a policy FILE in force and into the server's file, if it is good and passes the server's tests."""
    text = file.read_bytes()
    with server.connect() as client:
        etag = f'"{expect}"' if expect is not None else ask(client, "GET", PATH).etag
        answer = ask(client, "PUT", PATH, text=text, if_match=etag).document
    _print_version(server, answer)


def _checked_here(file: Path) -> dict[str, Any]:
    from inferflux_core.access.policy.casbin_policy import version_of
    from inferflux_core.access.policy.lint import check_policy

    text = file.read_bytes()
    problems = check_policy(text)
    return {
        "ok": all(problem.severity != "error" for problem in problems),
        "version": version_of(text),
        "problems": [{"line": p.line, "message": p.message, "severity": p.severity} for p in problems],
        "added": [],
        "removed": [],
    }


def _tested_here(file: Path, cases: Path) -> dict[str, Any]:
    from inferflux_core.access.policy.casbin_policy import Policy
    from inferflux_core.access.policy.cases import read_cases, run_cases
    from inferflux_core.access.policy.file import PolicyError

    try:
        compiled = Policy.compile(file.read_bytes(), str(file))
        read = read_cases(cases.read_bytes(), str(cases))
    except OSError as error:
        raise click.ClickException(f"{cases} cannot be read: {error.strerror}; name the test file with --cases") from error
    except PolicyError as error:
        raise click.ClickException(str(error)) from error
    failures = run_cases(compiled, read)
    return {"ok": not failures, "version": compiled.version, "cases": len(read), "failures": failures}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{file} is not UTF-8 text: byte {error.start} is not valid") from error


def _problem(problem: dict[str, Any]) -> str:
    line = "" if problem["line"] is None else f"line {problem['line']}: "
    return f"{line}{'warning: ' if problem['severity'] == 'warning' else ''}{printable(problem['message'])}"


def _print_version(server: Server, answer: dict[str, Any]) -> None:
    if server.as_json:
        print_json(answer)
        return
    click.echo(f"version {answer['version']} is in force")
    for warning in answer["warnings"]:
        click.echo(_problem(warning))


def _print_explanation(answer: dict[str, Any]) -> None:
    rule = "" if answer["rule"] is None else f": {printable(answer['rule'])}"
    click.echo(f"{'allowed' if answer['allowed'] else 'denied'} by {answer['engine']}{rule}")
    policy = answer["policy"]
    if policy is None:
        return
    if policy["note"] is not None:
        click.echo(printable(policy["note"]))
    if policy["roles"]:
        rows = [(role["role"], role["via"], "yes" if role["effective"] else "no: not declared") for role in policy["roles"]]
        print_table(("role", "from", "counts"), rows)
    if policy["matching"]:
        print_table(("rules that match",), [(rule,) for rule in policy["matching"]])
    if policy["nearest"]:
        print_table(
            ("rules that nearly match", "but"), [(near["rule"], cell("; ".join(near["why"]))) for near in policy["nearest"]]
        )
