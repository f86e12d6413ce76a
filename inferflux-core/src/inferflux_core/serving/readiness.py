"""Whether new requests should come to this server: one answer for probes, for the status of pools and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inferflux_core.serving.services import ModelView, Services


@dataclass(frozen=True, slots=True)
class ServerReadiness:
    """The answer. `reason` says why not, for people; empty when ready."""

    status: Literal["ready", "not_ready", "draining"]
    reason: str = ""


def readiness(services: Services) -> ServerReadiness:
    """Ready is a server that is not shutting down, whose default model is ready and whose engine makes progress."""
    if services.state.draining:
        return ServerReadiness("draining", "the server is shutting down")
    views: list[ModelView] = list(services.models.list())
    default = next((view for view in views if view.is_default), None)
    if default is None:
        return ServerReadiness("not_ready", "there is no default model")
    if default.state != "ready":
        return ServerReadiness("not_ready", f"the default model is {default.state}")
    if not default.making_progress:
        return ServerReadiness("not_ready", "the engine of the default model makes no progress")
    return ServerReadiness("ready")
