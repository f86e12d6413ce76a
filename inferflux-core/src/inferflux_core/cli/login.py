"""`inferctl login` and `inferctl logout`: an access token from the identity provider in place of an API key."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from inferflux_core.cli.api_errors import ApiError, printable
from inferflux_core.cli.server_options import Server, print_json, server_command

if TYPE_CHECKING:
    from inferflux_core.cli.device_flow import DeviceCode

DEFAULT_CLIENT_ID = "inferctl"


@click.command()
@click.option("--issuer", help="URL of the identity provider. Default: the one that the server names.")
@click.option("--client-id", default=DEFAULT_CLIENT_ID, show_default=True, help="What this program is called at the provider.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    help="Scope to ask for in place of infer:generate, infer:embed and infer:read. May be given several times.",
)
@click.option("--resource", help="Audience of the token. Default: the server's URL.")
@click.option("--no-browser", is_flag=True, help="Only print the address to log in at.")
@server_command
def login(
    server: Server,
    /,
    issuer: str | None,
    client_id: str,
    scopes: tuple[str, ...],
    resource: str | None,
    no_browser: bool,
) -> None:
    """Log in with a browser, on this machine or any other.

    From then on every command to this server uses the login, unless it is given an API key. Tokens are kept for this user
    only, and renewed by themselves; they are never printed.

    --json prints {"type":"device","user_code","verification_uri","verification_uri_complete","expires_in"}, then, once the
    login is confirmed, {"type":"done","url","issuer","scope","expires_at"}.
    """
    # httpx takes a while to import; only commands that send something pay for it.
    from inferflux_core.cli.device_flow import begin, wait_for_tokens
    from inferflux_core.cli.login_session import with_tokens
    from inferflux_core.cli.oauth_discovery import ProtectedResource, find_issuer, find_resource, scopes_to_ask
    from inferflux_core.cli.oauth_http import checked_url
    from inferflux_core.cli.token_store import Login, TokenStore

    url = server.endpoint.url
    if issuer is None:
        audience = find_resource(url, resource)
    else:
        checked_url(url, "the server's URL", local=True)
        audience = ProtectedResource(resource=resource or url, issuer=issuer)
    provider = find_issuer(audience.issuer)
    wanted = tuple(word for scope in scopes for word in scope.split())
    scope = scopes_to_ask(wanted, audience, provider)
    code = begin(provider, client_id=client_id, scope=scope, resource=audience.resource)
    _show(server, code, provider.issuer)
    if not no_browser:
        _open_browser(code.verification_uri_complete or code.verification_uri)
    tokens = wait_for_tokens(
        provider, code, client_id=client_id, resource=audience.resource, sleep=time.sleep, clock=time.monotonic
    )
    asked = Login(
        server=url,
        issuer=provider.issuer,
        client_id=client_id,
        resource=audience.resource,
        scope=scope,
        access_token=tokens.access_token,
        expires_at=None,
    )
    store = TokenStore.of_user()
    with store.locked(url):
        done = with_tokens(asked, tokens, time.time())
        store.save(done)
    if server.as_json:
        document = {"url": url, "issuer": done.issuer, "scope": done.scope, "expires_at": done.expires_at}
        print_json({"type": "done"} | document)
    else:
        click.echo(f"Logged in at {url}, for: {done.scope}")
    if server.endpoint.api_key is not None:
        click.echo("An API key is set (--api-key or INFERCTL_API_KEY); commands use that in place of this login.", err=True)


@click.command()
@server_command
def logout(server: Server, /) -> None:
    """End the login at this server: revoke its tokens and forget them.

    --json prints {"url","logged_out","revoked"}; logged_out is false where there was no login.
    """
    from inferflux_core.cli.token_store import TokenStore

    url = server.endpoint.url
    store = TokenStore.of_user()
    if store.load(url) is None:
        _report_logout(server, logged_out=False, revoked=False)
        return
    with store.locked(url):
        found = store.load(url)
        if found is None:  # another logout was faster
            _report_logout(server, logged_out=False, revoked=False)
            return
        try:
            revoked = _revoke(found.issuer, found.client_id, store.refresh_token(found), found.access_token)
        except ApiError as error:
            cause = f"The tokens are deleted here, but not revoked at {found.issuer!r}: {error}"
            raise ApiError(cause, status=error.status, code=error.code) from error
        finally:
            store.delete(found)
    _report_logout(server, logged_out=True, revoked=revoked)


def _revoke(issuer_url: str, client_id: str, refresh_token: str | None, access_token: str) -> bool:
    """Revokes the refresh token, and with it the login; an access token where there is no other and the provider can."""
    from inferflux_core.cli.device_flow import revoke
    from inferflux_core.cli.oauth_discovery import find_issuer

    issuer = find_issuer(issuer_url)
    if refresh_token is not None:
        return revoke(issuer, refresh_token, "refresh_token", client_id=client_id)
    try:
        return revoke(issuer, access_token, "access_token", client_id=client_id)
    except ApiError as error:
        if error.code == "unsupported_token_type":  # a signed token is good until it ends
            return False
        raise


def _report_logout(server: Server, *, logged_out: bool, revoked: bool) -> None:
    url = server.endpoint.url
    if server.as_json:
        print_json({"url": url, "logged_out": logged_out, "revoked": revoked})
    elif not logged_out:
        click.echo(f"There is no login at {url}")
    else:
        click.echo(f"Logged out of {url}" + ("" if revoked else "; the provider cannot revoke its tokens before they end"))


def _show(server: Server, code: DeviceCode, issuer: str) -> None:
    if server.as_json:
        print_json(
            {
                "type": "device",
                "user_code": code.user_code,
                "verification_uri": code.verification_uri,
                "verification_uri_complete": code.verification_uri_complete,
                "expires_in": code.expires_in,
            }
        )
        return
    click.echo(f"To log in with {printable(issuer)}, open this in a browser and confirm the code {code.user_code}:")
    click.echo(f"  {code.verification_uri_complete or code.verification_uri}")
    if code.verification_uri_complete is not None:
        click.echo(f"or open {code.verification_uri} anywhere and enter the code.")
    click.echo(f"Waiting for up to {max(1, round(code.expires_in / 60))} min; Ctrl-C gives up.")


def _open_browser(url: str) -> None:
    """Opens a window, where there are windows: a browser of the terminal would take the terminal away from this program."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER")
    if sys.platform.startswith("linux") and not has_display:
        return
    import webbrowser

    try:
        webbrowser.open(url)
    except (webbrowser.Error, OSError):
        return  # the address stands on the screen
