"""The settings of the edge, checked before anything starts: what a request meets before the application sees it."""

from __future__ import annotations

import ssl

from inferflux_core.serving.client_address import TrustedProxies
from inferflux_core.serving.hosts import HostCheck
from inferflux_core.serving.origins import OriginCheck
from inferflux_core.serving.tls import server_context
from inferflux_core.settings import ServerSettings


def check_edge(settings: ServerSettings) -> ssl.SSLContext | None:
    """Make every part of the edge once, and return its TLS context; None for plain HTTP.

    Raises:
        ConfigError: one of them cannot work as configured.
    """
    HostCheck(settings.host, settings.allowed_hosts)
    OriginCheck(settings.allowed_origins, settings.public_url)
    TrustedProxies(settings.trusted_proxies)
    return None if settings.tls is None else server_context(settings.tls)
