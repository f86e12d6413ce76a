"""`inferctl admin models`: loading and unloading models on a running server."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from inferflux_core.cli.admin.admin_client import ask
from inferflux_core.cli.admin.values import words
from inferflux_core.cli.api_errors import printable
from inferflux_core.cli.server_options import Server, print_json, server_command
from inferflux_core.cli.table import print_table

PATH = "/v1/admin/models"


@click.group()
def models() -> None:
    """Models of the running server. A restart serves those of its configuration again."""


@models.command("list")
@server_command
def list_models(server: Server, /) -> None:
    """List all models, those that failed too. --json prints {"object":"list","data":[...]}."""
    with server.connect() as client:
        answer = ask(client, "GET", PATH).document
    if server.as_json:
        print_json(answer)
        return
    print_table(
        ("model", "aliases", "source", "backend", "state", "running", "waiting", ""),
        [
            (
                model["id"],
                ", ".join(model["aliases"]),
                model["source"],
                model["backend"],
                model["state"],
                model["requests_running"],
                model["requests_waiting"],
                "default" * model["default"],
            )
            for model in answer["data"]
        ],
    )
    for model in answer["data"]:
        if model["last_error"] is not None:
            click.echo(printable(f"{model['id']}: {model['last_error']}"), err=True)


@models.command()
@click.argument("source")
@click.option("--id", "name", help="Name clients use. [default: made from the source]")
@click.option("--alias", "aliases", multiple=True, help="Further name of it. Repeatable.")
@click.option("--backend", help="Name of a backend. [default: the one that supports it]")
@click.option("--max-model-len", type=click.IntRange(min=16), help="Most tokens of a sequence.")
@click.option("--default", is_flag=True, help="Make it the default model once it is ready.")
@click.option("--no-wait", is_flag=True, help="Return at once, while it is loading.")
@server_command
def load(
    server: Server,
    /,
    source: str,
    name: str | None,
    aliases: tuple[str, ...],
    backend: str | None,
    max_model_len: int | None,
    default: bool,
    no_wait: bool,
) -> None:
    """Load a model: demo, hf:owner/repo, or a path on the server within its model_roots."""
    fields = {
        "id": name,
        "aliases": words(aliases) or None,
        "backend": backend,
        "max_model_len": max_model_len,
    }
    body = {"source": source, "default": default, "wait": not no_wait}
    body |= {field: value for field, value in fields.items() if value is not None}
    with server.connect() as client:
        _print_status(server, ask(client, "POST", PATH, body).document)


@models.command()
@click.argument("model")
@server_command
def unload(server: Server, /, model: str) -> None:
    """Unload a model. The requests it has may finish, within the server's drain_timeout_s."""
    with server.connect() as client:
        _print_status(server, ask(client, "DELETE", f"{PATH}/{quote(model)}").document)


@models.command("set-default")
@click.argument("model")
@server_command
def set_default(server: Server, /, model: str) -> None:
    """Make a ready model the one for requests that name none."""
    with server.connect() as client:
        answer = ask(client, "PUT", f"{PATH}/default", {"id": model}).document
    if server.as_json:
        print_json(answer)
    else:
        click.echo(printable(f"{answer['default_model']} is the default model"))


def _print_status(server: Server, answer: dict[str, Any]) -> None:
    if server.as_json:
        print_json(answer)
    else:
        click.echo(printable(f"{answer['id']} is {answer['status']}"))
