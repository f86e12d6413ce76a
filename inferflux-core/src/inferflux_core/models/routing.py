"""What happens to a request that names no model, or one that is not ready."""

from __future__ import annotations

from pydantic import Field

from inferflux_core.settings import Group


class Routing(Group):
    """Rules of finding a model. Another model than the one that was asked for never answers."""

    allow_default_fallback: bool = Field(
        True, description="Requests that name no model go to the default one; false refuses them with 400."
    )
    require_ready_backend: bool = Field(
        True,
        description="Requests for a model that is loading or restarting get 503 at once; false lets them wait, up to their "
        "deadline.",
    )
