"""Where a server is, and the key that it wants: checked once, before anything is sent."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

EXAMPLE = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's base URL, without a trailing slash or `/v1`, and an API key. Make one with `parse`."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """Reads what a user wrote. White space around either value is dropped, as is an empty key.

        Raises:
            ValueError: not an http or https URL with a host, or a key that cannot stand in a header; the message says
                what to write instead and never shows the key.
        """
        key = (api_key or "").strip()
        if not key.isascii() or not all(character.isprintable() and character != " " for character in key):
            raise ValueError("the API key has a space or a character outside ASCII. Copy it again, without line breaks")
        return cls(_base_url(url), key or None)

    @property
    def host(self) -> str:
        """Host name or address, without the brackets of an IPv6 address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port, also where the URL leaves it to the scheme."""
        return urlsplit(self.url).port or (443 if self.tls else 80)

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("https:")

    @property
    def path(self) -> str:
        """What stands before `/v1` on a server that is not at the root of its host; often empty."""
        return urlsplit(self.url).path

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine's loopback, where a proxy from the environment must not be used."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def headers(self) -> dict[str, str]:
        """The headers that carry the key; none without one."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def _base_url(url: str) -> str:
    text = url.strip()
    cure = f"Write it as {EXAMPLE}"
    if not text.isascii() or any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError(f"{url!r} has a space or a character outside ASCII. {cure}")
    if "://" not in text:
        raise ValueError(f"{url!r} has no scheme. Write it as {f'http://{text}' if text else EXAMPLE}")
    try:
        parts = urlsplit(text)
        port_is_valid = parts.port != 0
    except ValueError:
        raise ValueError(f"{url!r} has no valid host and port. {cure}") from None
    if not port_is_valid or parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an http or https URL with a host. {cure}")
    if parts.username is not None:
        raise ValueError(f"the URL of {parts.hostname!r} has a user name in it. Leave it out, and give --api-key")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or fragment. Give only the server's address. {cure}")
    base = parts._replace(scheme=parts.scheme.lower()).geturl()
    return base.rstrip("/").removesuffix("/v1").rstrip("/")
