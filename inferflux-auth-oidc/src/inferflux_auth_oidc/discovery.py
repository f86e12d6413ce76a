"""An issuer's metadata: where its keys are and whom to ask about opaque tokens."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from inferflux_auth_oidc.issuer_http import FetchError, IssuerHttp, Reply
from inferflux_auth_oidc.urls import check_url, origin

_KEPT_FOR = 3600.0  # seconds


class Discovery:
    """Endpoints of one issuer. A document is believed for an hour, or until something it named failed."""

    def __init__(self, issuer: str, http: IssuerHttp, monotonic: Callable[[], float]) -> None:
        self._issuer = issuer
        self._http = http
        self._monotonic = monotonic
        self._document: dict[str, object] = {}
        self._until = float("-inf")

    async def endpoint(self, name: str) -> str:
        """URL that the metadata name, such as `jwks_uri`; of the issuer's own origin.

        Raises:
            FetchError: the metadata cannot be had, are another issuer's, or name no such URL.
        """
        if self._monotonic() >= self._until:
            reply = await self._fetch()
            if reply.body.get("issuer") != self._issuer:
                raise FetchError("the metadata are of another issuer")
            self._document = reply.body
            self._until = self._monotonic() + _KEPT_FOR
        url = self._document.get(name)
        try:
            if not isinstance(url, str) or origin(check_url(url)) != origin(self._issuer):
                raise ValueError(name)
        except ValueError:
            self.forget()
            raise FetchError(
                f"the metadata have no {name!r} at the issuer's own origin; configure it if it is elsewhere"
            ) from None
        return url

    def forget(self) -> None:
        """Read the metadata again next time."""
        self._until = float("-inf")

    async def _fetch(self) -> Reply:
        try:
            return await self._http.get(self._issuer.rstrip("/") + "/.well-known/openid-configuration")
        except FetchError as error:
            if error.status is None or not 400 <= error.status < 500:
                raise
        # RFC 8414 puts its name between host and path.
        parts = urlsplit(self._issuer)
        path = parts.path.rstrip("/")
        return await self._http.get(f"{parts.scheme}://{parts.netloc}/.well-known/oauth-authorization-server{path}")
