"""An application behind an auth provider whose credentials say what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from core.serving.scripted import FakeModel, FakeModels, Stand, Step, stand
from inferflux_core.access.services import AccessServices
from inferflux_core.errors import AccessUnavailableError, AuthenticationError
from inferflux_core.identity import AuthContext, AuthProvider, Principal
from inferflux_core.interfaces import Registration
from inferflux_core.plugins import Distribution, PluginRegistry
from inferflux_core.settings import Settings
from inferflux_core.telemetry.metrics import Metrics


class Badges(AuthProvider):
    """Credentials `badge-<name>`, each for the principal of that name in `principals`; `asked-<name>` are as if somebody else
    had to be asked about them.

    Attributes:
        asked: credentials that it was asked about, in order.
    """

    def __init__(self, principals: dict[str, Principal]) -> None:
        self.principals = principals
        self.asked: list[str] = []

    def claims(self, credential: str) -> bool:
        return credential.startswith(("badge-", "asked-"))

    def is_local(self, credential: str) -> bool:
        return credential.startswith("badge-")

    async def authenticate(self, credential: str, address: str | None) -> Principal:
        self.asked.append(credential)
        name = credential.removeprefix("badge-").removeprefix("asked-")
        if name == "crash":
            raise RuntimeError(credential)
        if name == "down":
            raise AccessUnavailableError("Please retry later.")
        if name not in self.principals:
            raise AuthenticationError("unknown_badge")
        return self.principals[name]


def principal(name: str, *scopes: str, **attributes: Any) -> Principal:
    return Principal(subject=f"user:house|{name}", method="badges", scopes=frozenset(scopes), name=name, **attributes)  # type: ignore[arg-type]  # tests pass literals


PRINCIPALS = {
    "alice": principal("alice", "generate", "read", tenant="acme"),
    "only-tiny": principal("only-tiny", "generate", "read", tenant="acme", models=("tiny",)),
    "viewer": principal("viewer", "read", tenant="acme"),
    "embedder": principal("embedder", "embed", tenant="acme"),
    "nothing": principal("nothing", tenant="acme"),
    "admin": principal("admin", "admin", tenant="ops"),
    "late": principal("late", "generate", tenant="acme", expires_at=1.0),
    "nobody": Principal(subject="", method="badges"),
    "unmarked": Principal(subject="user:house|unmarked"),
}


def guarded_stand(tmp_path: Path, *steps: Step, **groups: Any) -> tuple[Stand, Badges]:
    """A stand with two models, `tiny` and `secret`, behind badges. Keyword arguments are groups of settings."""
    badges = Badges(PRINCIPALS)

    def make(settings: BaseModel, context: AuthContext) -> AuthProvider:
        return badges

    registry = PluginRegistry()
    registry.add("auth provider", Registration(name="badges", factory=make), Distribution("tests", "0"))
    auth = {"providers": ["badges"], "max_failures_per_minute": 10_000, **groups.pop("auth", {})}
    audit = {"enabled": False, **groups.pop("audit", {})}
    settings = Settings.model_validate({"state_dir": tmp_path / "state", "auth": auth, "audit": audit, **groups})
    metrics = Metrics()
    access = AccessServices.open(settings, metrics, registry)
    models = FakeModels([FakeModel("tiny", aliases=("small",)), FakeModel("secret", aliases=("hidden",), is_default=False)])
    return stand(*steps, models=models, settings=settings, access=access, metrics=metrics), badges
