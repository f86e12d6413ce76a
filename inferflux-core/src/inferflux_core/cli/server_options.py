"""The options that every inferctl subcommand shares: where the server is, the key, and how to report."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

import click
import msgspec

from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.endpoint import EXAMPLE, Endpoint

P = ParamSpec("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalOptions:
    """What was given before the subcommand's name; the subcommand's own options win."""

    url: str
    api_key: str | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Server:
    """The server that a subcommand talks to, and how it reports."""

    endpoint: Endpoint
    timeout_s: float
    as_json: bool

    def connect(self) -> ApiClient:
        """A client for the server; nothing is sent yet. Without an API key it uses the login there, if there is one."""
        if self.endpoint.api_key is None:
            from inferflux_core.cli.login_session import LoggedInClient, LoginSession
            from inferflux_core.cli.token_store import TokenStore

            session = LoginSession(TokenStore.of_user(), self.endpoint.url)
            if session.exists():
                return LoggedInClient(self.endpoint, session, timeout_s=self.timeout_s)
        return ApiClient(self.endpoint, timeout_s=self.timeout_s)


_URL_HELP = "Base URL of the server."
_KEY_HELP = "API key. The environment keeps it out of the process list."
_TIMEOUT_HELP = "Longest silence within an answer, in seconds."


def global_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --url, --api-key and --timeout to the group, whose function gets them as `options`."""

    @click.option("--url", envvar="INFERCTL_URL", default=EXAMPLE, show_default=True, show_envvar=True, help=_URL_HELP)
    @click.option("--api-key", envvar="INFERCTL_API_KEY", show_envvar=True, help=_KEY_HELP)
    @click.option("--timeout", type=click.FloatRange(min=0.1), default=300, show_default=True, help=_TIMEOUT_HELP)
    @functools.wraps(function)
    def wrapper(url: str, api_key: str | None, timeout: float) -> None:
        function(options=GlobalOptions(url=url, api_key=api_key, timeout_s=timeout))

    return wrapper


def server_command(function: Callable[Concatenate[Server, P], None]) -> Callable[..., None]:
    """Gives a subcommand its Server as first argument, adds --url, --api-key, --timeout and --json to its options, and
    turns ApiError into a message and exit code 1. With --json the error is also a document on stdout."""

    @click.option("--url", help=_URL_HELP)
    @click.option("--api-key", help=_KEY_HELP)
    @click.option("--timeout", type=click.FloatRange(min=0.1), help=_TIMEOUT_HELP)
    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(
        context: click.Context,
        /,
        url: str | None,
        api_key: str | None,
        timeout: float | None,
        as_json: bool,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        outer = context.find_object(GlobalOptions)
        if outer is None:
            raise RuntimeError("a server_command needs a group that stores GlobalOptions")
        try:
            endpoint = Endpoint.parse(url or outer.url, api_key or outer.api_key)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        server = Server(endpoint, timeout or outer.timeout_s, as_json)
        try:
            function(server, *args, **kwargs)
        except ApiError as error:
            if as_json:
                print_json({"type": "error", "error": describe(error)})
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo(err=True)
            sys.exit(130)  # what shells expect of a program that Ctrl-C has ended

    return wrapper


def describe(error: ApiError) -> dict[str, object]:
    """The error for programs."""
    return {"message": str(error), "status": error.status, "code": error.code}


def print_json(document: object) -> None:
    """Prints one JSON document on one line."""
    click.echo(msgspec.json.encode(document).decode())
