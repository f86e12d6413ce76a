"""`inferctl admin cache`, `routing`, `pools` and `config`: what the server does, and two rules of it."""

from __future__ import annotations

import sys
from typing import Any

import click

from inferflux_core.cli.admin.admin_client import ask
from inferflux_core.cli.api_errors import printable
from inferflux_core.cli.server_options import Server, print_json, server_command
from inferflux_core.cli.table import cell, print_table

CACHE = "/v1/admin/cache"
ROUTING = "/v1/admin/routing"
POOLS = "/v1/admin/pools"
CONFIG = "/v1/admin/config"


@click.group()
def cache() -> None:
    """The prefix cache."""


@cache.command()
@server_command
def status(server: Server, /) -> None:
    """Show how often prompts were found in the cache, by model."""
    with server.connect() as client:
        answer = ask(client, "GET", CACHE).document
    if server.as_json:
        print_json(answer)
        return
    print_table(
        ("model", "enabled", "hits", "misses", "hit rate", "tokens from cache", "of prompt tokens", "KV cache in use"),
        [
            (
                model["model"],
                "yes" if model["enabled"] else "no",
                model["hits"],
                model["misses"],
                f"{model['hit_rate']:.0%}",
                model["matched_tokens"],
                model["prompt_tokens"],
                f"{model['memory']['paged_kv']['usage_ratio']:.0%}",
            )
            for model in answer["data"]
        ],
    )


@cache.command()
@click.argument("prompt", required=False)
@click.option("--system", help="A chat's system text to compute, instead of a raw PROMPT.")
@click.option("--model", "-m", help="Model id or alias. [default: the server's default model]")
@click.option("--tenant", help="Whose requests will find it. [default: your own tenant]")
@server_command
def warm(server: Server, /, prompt: str | None, system: str | None, model: str | None, tenant: str | None) -> None:
    """Compute a prefix now, so that requests beginning with it start faster: a raw PROMPT (- for stdin) or --system."""
    if (prompt is None) == (system is None):
        raise click.UsageError("give either a PROMPT or --system")
    body: dict[str, Any] = {"model": model, "tenant": tenant}
    if system is not None:
        body["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": "."}]
    else:
        body["prompt"] = sys.stdin.read() if prompt == "-" else prompt
    with server.connect() as client:
        answer = ask(client, "POST", f"{CACHE}/warm", body).document
    if server.as_json:
        print_json(answer)
        return
    known = f", {answer['cached_tokens']} of them known before" if answer["cached_tokens"] else ""
    click.echo(printable(f"{answer['model']}: {answer['tokens']} tokens computed for tenant {answer['tenant']}{known}"))


@click.group()
def routing() -> None:
    """What happens to requests that name no model, or one that is not ready."""


@routing.command("get")
@server_command
def get_routing(server: Server, /) -> None:
    """Show the rules. --json prints {"allow_default_fallback","require_ready_backend"}."""
    with server.connect() as client:
        _print_rules(server, ask(client, "GET", ROUTING).document)


@routing.command("set")
@click.option(
    "--allow-default-fallback", type=click.BOOL, metavar="BOOL", help="Requests that name no model go to the default."
)
@click.option("--require-ready-backend", type=click.BOOL, metavar="BOOL", help="A model that is not ready answers 503 at once.")
@server_command
def set_routing(server: Server, /, **given: bool | None) -> None:
    """Change one rule or both."""
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("give --allow-default-fallback, --require-ready-backend or both")
    with server.connect() as client:
        before = ask(client, "GET", ROUTING)
        answer = ask(client, "PUT", ROUTING, {**before.document, **changes}, if_match=before.etag)
    _print_rules(server, answer.document)


@click.command()
@server_command
def pools(server: Server, /) -> None:
    """Show whether the server takes requests, and how many wait. Exit code 1 if it takes none."""
    with server.connect() as client:
        answer = ask(client, "GET", POOLS).document
    health, scheduler = answer["pool_health"], answer["scheduler"]
    if server.as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['status']}{': ' * bool(health['reason'])}{printable(health['reason'])}")
        print_table(tuple(name.replace("_", " ") for name in scheduler), [tuple(scheduler.values())])
    if not health["ready"]:
        sys.exit(1)


@click.command()
@server_command
def config(server: Server, /) -> None:
    """Show every setting of the running server and where it comes from; secrets are masked."""
    with server.connect() as client:
        answer = ask(client, "GET", CONFIG).document
    if server.as_json:
        print_json(answer)
        return
    rows = [(name, _plain(setting["value"]), setting["origin"]) for name, setting in answer["settings"].items()]
    print_table(("setting", "value", "from"), rows, title=None if answer["file"] is None else f"file {answer['file']}")


def _plain(value: Any) -> object:
    return cell(value) if not isinstance(value, list) else " ".join(map(str, value))


def _print_rules(server: Server, rules: dict[str, bool]) -> None:
    if server.as_json:
        print_json(rules)
    else:
        print_table(("rule", "value"), [(name, str(value).lower()) for name, value in rules.items()])
