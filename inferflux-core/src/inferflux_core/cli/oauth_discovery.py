"""Where to log in for a server: its protected resource metadata (RFC 9728), then its issuer's (OpenID Connect, RFC 8414)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.oauth_http import checked_url, get_json, is_loopback
from inferflux_core.identity import ACTIONS

USER_SCOPES = tuple(f"infer:{action}" for action in ACTIONS if action != "admin")
"""What a login asks for if not told otherwise: all that a user does, not what an administrator does."""
_WELL_KNOWN = "/.well-known/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedResource:
    """A server as its identity provider knows it.

    Attributes:
        resource: audience of its access tokens.
        issuer: who issues them.
        scopes: those that the server knows; None if it does not say.
    """

    resource: str
    issuer: str
    scopes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """An identity provider's endpoints. `revocation` is None where it has none; `scopes` where it does not say."""

    issuer: str
    token: str
    device_authorization: str | None
    revocation: str | None
    scopes: tuple[str, ...] | None


def find_resource(server_url: str, resource: str | None = None) -> ProtectedResource:
    """Asks a server who issues the tokens that it takes.

    Args:
        server_url: base URL, as `Endpoint.url`.
        resource: the resource that the server is expected to be; by default one with the server's own URL. A server that could
            name any resource could have tokens for somebody else's server sent to itself (RFC 9728, section 7.3).

    Raises:
        ApiError: it cannot be reached, has no such metadata, or calls itself something else.
    """
    checked_url(server_url, "the server's URL", local=True)
    document: dict[str, Any] = {}
    status = 404
    for url in _resource_metadata_urls(server_url):
        status, document = get_json(url)
        if status == 200:
            break
    servers = document.get("authorization_servers")
    if status != 200 or not isinstance(servers, list) or not servers:
        raise ApiError(
            f"{server_url} does not say who issues its access tokens (HTTP {status}). If it takes any, name the issuer with "
            "--issuer; otherwise give an API key with --api-key",
            status=status,
            code="no_login",
        )
    named = document.get("resource")
    if not isinstance(named, str) or not same_place(named, resource or server_url):
        shown = repr(named[:200]) if isinstance(named, str) else "nothing"
        raise ApiError(
            f"{server_url} calls itself {shown}; a token for that is not sent to another address. Use that as --url, or, "
            "if you trust this one to pass requests on to it, give it as --resource",
            code="resource_mismatch",
        )
    issuer = checked_url(servers[0], "the issuer that the server names", local=is_loopback(server_url))
    return ProtectedResource(resource=named, issuer=issuer, scopes=_strings(document.get("scopes_supported")))


def find_issuer(issuer: str) -> Issuer:
    """Asks an issuer for its endpoints.

    Raises:
        ApiError: it cannot be reached, is not https, has no such document, or one that is another issuer's.
    """
    checked_url(issuer, "the issuer", local=True)
    status = 404
    for url in _issuer_metadata_urls(issuer):
        status, document = get_json(url)
        if status == 200:
            break
    else:
        raise ApiError(
            f"{issuer} has no OpenID Connect or OAuth metadata (HTTP {status}). Is it the issuer's exact URL?",
            status=status,
            code="no_issuer",
        )
    if document.get("issuer") != issuer:
        # Mix-up: one issuer's document that names another's endpoints (RFC 8414, section 3.3).
        raise ApiError(
            f"the metadata of {issuer} is of the issuer {str(document.get('issuer'))[:200]!r}. Give the issuer exactly as its "
            "metadata does, with or without a slash at the end",
            code="issuer_mismatch",
        )
    local = is_loopback(issuer)

    def endpoint(name: str) -> str | None:
        url = document.get(name)
        return None if url is None else checked_url(url, f"the issuer's {name}", local=local)

    token = endpoint("token_endpoint")
    if token is None:
        raise ApiError(f"the metadata of {issuer} has no token_endpoint", code="no_issuer")
    return Issuer(
        issuer=issuer,
        token=token,
        device_authorization=endpoint("device_authorization_endpoint"),
        revocation=endpoint("revocation_endpoint"),
        scopes=_strings(document.get("scopes_supported")),
    )


def scopes_to_ask(wanted: tuple[str, ...], resource: ProtectedResource, issuer: Issuer) -> str:
    """The `scope` of a login: `openid offline_access`, and what the user wants or what a user needs.

    Scopes that one side is known not to have are left out of the defaults, as some issuers refuse a request for them.
    """
    standard = [name for name in ("openid", "offline_access") if issuer.scopes is None or name in issuer.scopes]
    own = wanted or [name for name in USER_SCOPES if resource.scopes is None or name in resource.scopes]
    return " ".join(dict.fromkeys([*standard, *own]))


def same_place(one: str, other: str) -> bool:
    """Whether two URLs have the same scheme, host, port and path; a slash at the end makes no difference."""
    return _place(one) is not None and _place(one) == _place(other)


def _place(url: str) -> tuple[str, str, int, str] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None
    if parts.query or parts.fragment or parts.username is not None:
        return None
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")


def _resource_metadata_urls(server_url: str) -> list[str]:
    # The standard's place first; a proxy that passes on only what is below the server's path never shows that one.
    name = "oauth-protected-resource"
    return list(dict.fromkeys([_inserted(server_url, name), server_url + _WELL_KNOWN + name]))


def _issuer_metadata_urls(issuer: str) -> list[str]:
    return [issuer.rstrip("/") + _WELL_KNOWN + "openid-configuration", _inserted(issuer, "oauth-authorization-server")]


def _inserted(url: str, name: str) -> str:
    """The well-known URL between host and path (RFC 8615)."""
    parts = urlsplit(url)
    return parts._replace(path=_WELL_KNOWN + name + parts.path.rstrip("/"), query="", fragment="").geturl()


def _strings(value: object) -> tuple[str, ...] | None:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else None
