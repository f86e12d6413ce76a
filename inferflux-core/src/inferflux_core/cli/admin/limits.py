"""`inferctl admin limits` and `rate-limit`: quotas of everyone, of tenants and of models."""

from __future__ import annotations

from typing import Any

import click

from inferflux_core.cli.admin.admin_client import ask
from inferflux_core.cli.admin.values import LIMITS, LimitValue, given_limits, limit_options
from inferflux_core.cli.server_options import Server, print_json, server_command
from inferflux_core.cli.table import cell, print_table

PATH = "/v1/admin/limits"
OLD_PATH = "/v1/admin/rate_limit"


@click.group()
def limits() -> None:
    """Quotas of everyone, of tenants and of models. A key's own are changed with `api-keys update`."""


@limits.command("get")
@server_command
def get_limits(server: Server, /) -> None:
    """Show the quotas in force. --json prints {"default","tenants","models"}."""
    with server.connect() as client:
        table = ask(client, "GET", PATH).document
    _print(server, table)


@limits.command("set")
@click.option("--tenant", help="Of all of this tenant together; '*' is each one not named.")
@click.option("--model", help="Of all use of this model together; '*' is each one not named.")
@limit_options
@click.option("--remove", is_flag=True, help="Remove the quota of --tenant or --model.")
@server_command
def set_limits(server: Server, /, tenant: str | None, model: str | None, remove: bool, **options: Any) -> None:
    """Change a quota: of each key or user without limits of its own, or of a --tenant or --model. What is not named stays."""
    if tenant is not None and model is not None:
        raise click.UsageError("give --tenant or --model, not both")
    changes = given_limits(options)
    if remove:
        if changes or (tenant is None and model is None):
            raise click.UsageError("--remove needs --tenant or --model, and no limits")
    elif not changes:
        raise click.UsageError("say what to change; see --help")
    with server.connect() as client:
        before = ask(client, "GET", PATH)
        table = before.document
        if tenant is None and model is None:
            table["default"] |= changes
        else:
            section = table["tenants"] if tenant is not None else table["models"]
            name = tenant if tenant is not None else model
            if not remove:
                section[name] = {**section.get(name, {}), **changes}
            elif section.pop(name, None) is None:
                raise click.ClickException(f"there is no quota for {name!r}")
        answer = ask(client, "PUT", PATH, table, if_match=before.etag)
    _print(server, answer.document)


@click.group("rate-limit")
def rate_limit() -> None:
    """The two limits a minute of everyone; `limits` has all of them."""


@rate_limit.command("get")
@server_command
def get_rate_limit(server: Server, /) -> None:
    """Show them. --json prints {"tokens_per_minute","requests_per_minute"}."""
    with server.connect() as client:
        _print_rate_limit(server, ask(client, "GET", OLD_PATH).document)


@rate_limit.command("set")
@click.option("--tpm", type=LimitValue(), help="Tokens a minute; none for no limit.")
@click.option("--rpm", type=LimitValue(), help="Requests a minute; none for no limit.")
@server_command
def set_rate_limit(server: Server, /, tpm: int | None, rpm: int | None) -> None:
    """Change one or both."""
    given = {"tokens_per_minute": tpm, "requests_per_minute": rpm}
    body = {name: value or None for name, value in given.items() if value is not None}
    if not body:
        raise click.UsageError("give --tpm, --rpm or both")
    with server.connect() as client:
        _print_rate_limit(server, ask(client, "PUT", OLD_PATH, body).document)


def _print(server: Server, table: dict[str, Any]) -> None:
    if server.as_json:
        print_json(table)
        return
    rows = [("each without its own", table["default"])]
    rows += [(f"tenant {name}", limits) for name, limits in table["tenants"].items()]
    rows += [(f"model {name}", limits) for name, limits in table["models"].items()]
    print_table(("whose", *LIMITS), [(whose, *(cell(limits[name]) for name in LIMITS)) for whose, limits in rows])


def _print_rate_limit(server: Server, answer: dict[str, Any]) -> None:
    if server.as_json:
        print_json(answer)
    else:
        print_table(("tokens a minute", "requests a minute"), [tuple(map(cell, answer.values()))])
