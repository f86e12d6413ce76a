"""Deny by default: every route says what it needs, and one that says nothing cannot be registered.

`AccessGate` has found the principal before a route is looked up; here the route's own requirement is checked, before anything
of the request is read.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from inferflux_core.identity import Action, Principal
from inferflux_core.serving.exchange import Exchange

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__inferflux_requirement__"


@dataclass(frozen=True, slots=True)
class Permission:
    """An action on an object of the API, such as `admin` on `api/keys`."""

    obj: str
    action: Action


class Rule(Enum):
    """Requirements other than a permission.

    PUBLIC: nothing, not even a credential. The path must be one that the gate lets through as well.
    MODEL: a credential; the handler asks `Admission` for the model that the request names, or lists only what may be seen.
    """

    PUBLIC = "public"
    MODEL = "model"


def public(endpoint: F) -> F:
    """Marks a route that everybody may call."""
    setattr(endpoint, _ATTRIBUTE, Rule.PUBLIC)
    return endpoint


def model_checked(endpoint: F) -> F:
    """Marks a route whose handler asks `Admission` about each model it touches."""
    setattr(endpoint, _ATTRIBUTE, Rule.MODEL)
    return endpoint


def needs(obj: str, action: Action) -> Callable[[F], F]:
    """Marks a route that needs a permission on an object of the API."""

    def mark(endpoint: F) -> F:
        setattr(endpoint, _ATTRIBUTE, Permission(obj, action))
        return endpoint

    return mark


def requirement_of(endpoint: Callable[..., Any]) -> Permission | Rule:
    """What an endpoint needs. Raises TypeError if it does not say."""
    requirement = getattr(endpoint, _ATTRIBUTE, None)
    if not isinstance(requirement, Permission | Rule):
        raise TypeError(f"the route {endpoint.__qualname__} does not say who may call it; add @needs or another mark")
    return requirement


class GuardedRoute(APIRoute):
    """A route that checks what its endpoint was marked with. Use it as `APIRouter(route_class=GuardedRoute)`."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As Starlette's, whose patterns end in `$`, which would also match before a line break at the end of the path."""
        return (Match.NONE, {}) if scope.get("path", "").endswith("\n") else super().matches(scope)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the check."""
        requirement = requirement_of(self.endpoint)
        handler = super().get_route_handler()
        if not isinstance(requirement, Permission):
            return handler

        async def guarded(request: Request) -> Response:
            exchange = Exchange.of(request.scope)
            exchange.authorize(requirement.obj, requirement.action)
            return await handler(request)

        return guarded


def principal_of(scope: Scope) -> Principal:
    """Who sent the request that this scope belongs to."""
    return Exchange.of(scope).principal
