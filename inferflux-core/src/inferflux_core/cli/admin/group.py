"""`inferctl admin`: everything that an administrator does to a running server, and to its host."""

from __future__ import annotations

import click

from inferflux_core.cli.admin.api_keys import api_keys
from inferflux_core.cli.admin.limits import limits, rate_limit
from inferflux_core.cli.admin.models import models
from inferflux_core.cli.admin.policy import policy
from inferflux_core.cli.admin.server_state import cache, config, pools, routing


@click.group()
def admin() -> None:
    """Administer a server. Needs a key with the scope admin; the first one comes from `api-keys create --bootstrap`."""


for _command in (api_keys, policy, limits, rate_limit, models, cache, routing, pools, config):
    admin.add_command(_command)
