"""URLs of issuers: which ones this server is willing to talk to."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

_UNPRINTABLE_OR_SEPARATOR = frozenset('|"<>\\^`{} ')


def check_url(url: str, *, query: bool = True) -> str:
    """Returns the URL unchanged if it may be used: https, or http where the host is loopback, without user and fragment.

    Args:
        query: whether it may have one; an issuer may not (OpenID Connect Discovery).

    Raises:
        ValueError: with what is wrong about it.
    """
    if not url.isascii() or not url.isprintable() or not _UNPRINTABLE_OR_SEPARATOR.isdisjoint(url):
        raise ValueError(f"{url!r} has characters that a URL cannot have")
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from None
    if not host or parts.scheme not in ("https", "http"):
        raise ValueError(f"{url!r} is not an https URL")
    if parts.scheme == "http" and not _loopback(host):
        raise ValueError(f"{url!r} is http, which anyone on the way can rewrite; use https (http is for loopback only)")
    if "@" in parts.netloc or "#" in url or ("?" in url and not query):
        raise ValueError(f"{url!r} has a user, a fragment or a query; leave it out")
    return url


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a checked URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
