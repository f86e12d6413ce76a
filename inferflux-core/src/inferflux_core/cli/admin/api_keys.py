"""`inferctl admin api-keys`: making, listing, changing, rotating and revoking API keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from inferflux_core.cli.admin.admin_client import ask
from inferflux_core.cli.admin.values import Duration, given_limits, limit_options, words
from inferflux_core.cli.api_errors import printable
from inferflux_core.cli.server_options import Server, print_json, server_command
from inferflux_core.cli.table import cell, print_table
from inferflux_core.identity import ACTIONS

PATH = "/v1/admin/api-keys"
_ACTIONS = f"{', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"

quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print the key and nothing else.")
config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="On this host: the server's configuration file. [default: as for inferflux serve]",
)


def _term_options(function: Callable[..., None]) -> Callable[..., None]:
    """What a key is for; the same for a new key and for a change."""
    for option in (
        click.option("--expires-at", metavar="TIME", help="When it stops being valid, such as 2027-01-31T00:00:00Z."),
        click.option("--expires-in", type=Duration(), metavar="TIME", help="For how long it is valid, such as 90d."),
        click.option("--cidr", "cidrs", multiple=True, help="Network of clients that may use it. Repeatable."),
        click.option("--priority", type=int, help="Of its requests in the scheduler; lower runs first."),
        limit_options,
        click.option(
            "--model", "models", multiple=True, help="Pattern of model names it is for, such as 'acme-*'. Repeatable."
        ),
        click.option("--role", "roles", multiple=True, help="Role of the policy, without 'role:'. Repeatable."),
        click.option("--scope", "scopes", multiple=True, help=f"{_ACTIONS}. Repeatable."),
        click.option("--owner", help="Who answers for it."),
    ):
        function = option(function)
    return function


@click.group("api-keys")
def api_keys() -> None:
    """API keys of the server."""


@api_keys.command("list")
@server_command
def list_keys(server: Server, /) -> None:
    """List all keys, revoked and expired ones too. --json prints {"object":"list","data":[...]}."""
    with server.connect() as client:
        answer = ask(client, "GET", PATH)
    if server.as_json:
        print_json(answer.document)
        return
    print_table(
        ("id", "name", "tenant", "scopes", "roles", "models", "state", "last used"),
        [
            (
                key["id"],
                key["name"],
                key["tenant"],
                " ".join(key["scopes"]),
                " ".join(key["roles"]),
                "all" if key["models"] is None else " ".join(key["models"]),
                key_state(key),
                cell(key["last_used_at"]),
            )
            for key in answer.document["data"]
        ],
    )


@api_keys.command()
@click.option("--name", help="For people, in lists and in the audit log.")
@click.option("--tenant", help="Whose data its requests are: caches and quotas are kept apart by tenant.")
@_term_options
@quiet_option
@click.option("--bootstrap", is_flag=True, help="Write into the key store on this host instead of asking a server.")
@config_option
@server_command
def create(
    server: Server,
    /,
    name: str | None,
    tenant: str | None,
    quiet: bool,
    bootstrap: bool,
    config_file: Path | None,
    **terms: Any,
) -> None:
    """Make a key and print it, once: it is kept nowhere.

    With --bootstrap it is made on the server's own host, without a server or beside a running one: this is how the first
    administrator's key comes to be. Its scope is then admin unless --scope says otherwise.
    """
    body = _terms(terms)
    if tenant is not None:
        body["tenant"] = tenant
    if config_file is not None and not bootstrap:
        raise click.UsageError("--config belongs to --bootstrap; a running server has its own configuration")
    if not bootstrap:
        if name is None:
            raise click.UsageError("give the key a --name")
        with server.connect() as client:
            key = ask(client, "POST", PATH, {"name": name, **body}).document
    else:
        from inferflux_core.cli.admin.host import bootstrap_key

        body.setdefault("scopes", ["admin"])
        key = bootstrap_key({"name": name or "bootstrap", **body}, config_file)
    _print_secret(server, key, quiet)


@api_keys.command()
@click.argument("key_id", metavar="ID")
@server_command
def show(server: Server, /, key_id: str) -> None:
    """Show one key."""
    with server.connect() as client:
        answer = ask(client, "GET", _one(key_id))
    _print_key(server, answer.document)


@api_keys.command()
@click.argument("key_id", metavar="ID")
@click.option("--name", help="For people, in lists and in the audit log.")
@_term_options
@click.option("--any-model", is_flag=True, help="Remove the patterns of models: it is for all.")
@click.option("--default-limits", is_flag=True, help="Remove its own limits: it has those of everyone.")
@click.option("--never-expires", is_flag=True, help="Remove the time at which it stops being valid.")
@server_command
def update(
    server: Server,
    /,
    key_id: str,
    name: str | None,
    any_model: bool,
    default_limits: bool,
    never_expires: bool,
    **terms: Any,
) -> None:
    """Change what the options name, and nothing else. A limit that is given replaces that limit only."""
    body = _terms(terms)
    if name is not None:
        body["name"] = name
    for flag, field in ((any_model, "models"), (default_limits, "limits"), (never_expires, "expires_at")):
        if flag:
            if field in body or (field == "expires_at" and "expires_in_s" in body):
                raise click.UsageError(f"{field} is both given and removed; choose one")
            body[field] = None
    if not body:
        raise click.UsageError("say what to change; see --help")
    with server.connect() as client:
        before = ask(client, "GET", _one(key_id))
        if body.get("limits"):
            body["limits"] = {**(before.document["limits"] or {}), **body["limits"]}
        answer = ask(client, "PATCH", _one(key_id), body, if_match=before.etag)
    _print_key(server, answer.document)


@api_keys.command()
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap", type=Duration(), default=0.0, metavar="TIME", help="For how long the old secret stays valid, e.g. 1h."
)
@quiet_option
@server_command
def rotate(server: Server, /, key_id: str, overlap: float, quiet: bool) -> None:
    """Give a key a new secret under the same id and print it, once. Without --overlap the old one ends now."""
    with server.connect() as client:
        key = ask(client, "POST", f"{_one(key_id)}/rotate", {"overlap_s": overlap}).document
    _print_secret(server, key, quiet)


@api_keys.command()
@click.argument("key_id", metavar="ID")
@server_command
def revoke(server: Server, /, key_id: str) -> None:
    """Make a key invalid for ever, within a second."""
    with server.connect() as client:
        answer = ask(client, "DELETE", _one(key_id))
    _print_key(server, answer.document)


@api_keys.command("hash")
@click.option("--new", is_flag=True, help="Make a key too, and print it first.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def hash_key(new: bool, config_file: Path | None, as_json: bool) -> None:
    """Print what the configuration may hold of a key: auth.settings.api_keys.keys[].hash.

    Runs on the server's host, whose pepper it needs. The key is read from standard input, never from the command line.
    """
    from inferflux_core.cli.admin.host import hash_of, make_key

    key = make_key(config_file) if new else sys.stdin.readline().strip()
    if not key:
        raise click.UsageError('pipe a key in, e.g. printf %s "$KEY" | inferctl admin api-keys hash; or use --new')
    hashed = hash_of(key, config_file)
    if as_json:
        print_json({"key": key, "hash": hashed} if new else {"hash": hashed})
        return
    if new:
        click.echo(key)
    click.echo(hashed)


def key_state(key: dict[str, Any]) -> str:
    """`active`, `revoked` or `expired`."""
    if key["revoked_at"] is not None:
        return "revoked"
    if key["expires_at"] is not None and datetime.fromisoformat(key["expires_at"]) <= datetime.now(UTC):
        return "expired"
    return "active"


def _terms(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that the options stand for; those not given are left out."""
    limits = given_limits(options)
    fields = {
        "owner": options["owner"],
        "scopes": words(options["scopes"]) or None,
        "roles": words(options["roles"]) or None,
        "models": words(options["models"]) or None,
        "limits": limits or None,
        "priority": options["priority"],
        "cidr": words(options["cidrs"]) or None,
        "expires_in_s": options["expires_in"],
        "expires_at": options["expires_at"],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _one(key_id: str) -> str:
    if not key_id.isascii() or not key_id.isalnum():
        raise click.UsageError(f"{key_id!r} is no id of a key: those are 12 letters and digits; never give the key itself here")
    return f"{PATH}/{key_id}"


def _print_secret(server: Server, key: dict[str, Any], quiet: bool) -> None:
    if server.as_json:
        print_json(key)
        return
    click.echo(key["key"])
    if not quiet:
        click.echo(printable(f"Key {key['id']} ({key['name']}). It is shown this once: keep it in a safe place."), err=True)


def _print_key(server: Server, key: dict[str, Any]) -> None:
    if server.as_json:
        print_json(key)
        return
    shown = {**key, "state": key_state(key)}
    for name in ("scopes", "roles", "models", "cidr"):
        if shown[name] is not None:
            shown[name] = " ".join(shown[name])
    if shown["limits"] is not None:
        shown["limits"] = " ".join(f"{name}={value}" for name, value in shown["limits"].items() if value is not None)
    print_table(("field", "value"), [(name, cell(value)) for name, value in shown.items()])
