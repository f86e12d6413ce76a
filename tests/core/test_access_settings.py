"""Settings of access control that contradict one another are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from inferflux_core.config import check_plugins, load_settings
from inferflux_core.errors import ConfigError
from inferflux_core.plugins import load_plugins


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"auth": {"providers": ["api_key"]}},
            "auth.providers: no installed plugin registers an auth provider named 'api_key'",
        ),
        ({"auth": {"providers": ["api_keys", "api_keys"]}}, "auth.providers: a name stands there twice; remove one"),
        (
            {"auth": {"settings": {"api_keys": {}}}},
            "auth.settings.api_keys: there are settings, but auth.providers has no 'api_keys'; add it there",
        ),
        (
            {"auth": {"providers": ["api_keys"]}, "server": {"insecure_no_auth": True}},
            "server.insecure_no_auth: is on although auth.providers are set; turn one of them off",
        ),
        (
            {"policy": {"file": "policy.csv"}},
            "policy.file: a policy without auth.providers would never be asked; set auth.providers",
        ),
        (
            {"limits": {"store": "redis"}},
            "limits.redis_url: is missing, and limits.store is 'redis'; set it, e.g. redis://127.0.0.1:6379/0",
        ),
    ],
)
def test_access_settings_that_contradict_one_another_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_plugins(load_settings(overrides=overrides, environ={}).settings, load_plugins())
    assert message in str(caught.value)
