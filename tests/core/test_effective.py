"""What is shown of the effective configuration, and above all what is not."""

from __future__ import annotations

from pydantic import SecretStr

from inferflux_core.config import load_settings
from inferflux_core.effective import MASK, as_json, as_yaml, effective_values
from inferflux_core.interfaces import Registration
from inferflux_core.plugins import Distribution, PluginRegistry
from inferflux_core.setting_keys import dotted
from inferflux_core.settings import Group


class Account(Group):
    """Settings with secrets at several depths."""

    user: str = ""
    password: SecretStr = SecretStr("")


class Remote(Group):
    """Settings of a backend with accounts."""

    account: Account = Account()
    more: tuple[Account, ...] = ()
    keys: tuple[SecretStr, ...] = ()


def test_secrets_are_masked_at_any_depth() -> None:
    values = {
        "account": {"user": "me", "password": "s3cr3t"},
        "more": [{"user": "you", "password": "s3cr3t"}],
        "keys": ["s3cr3t"],
    }
    models = [
        {"source": "demo", "backend_settings": values},
        {"source": "b", "backend": "far", "backend_settings": values},
    ]
    registry = PluginRegistry()
    registry.add("backend", Registration(name="far", factory=object, settings=Remote), Distribution("acme", "1.0"))
    loaded = load_settings(overrides={"backends": {"far": values}, "models": models}, environ={})
    effective = effective_values(loaded, registry)
    assert "s3cr3t" not in as_json(loaded, effective)
    assert "s3cr3t" not in as_yaml(effective)
    shown = {dotted(item.path): item.value for item in effective}
    for section in ("backends.far", "models[0].backend_settings", "models[1].backend_settings"):
        assert shown[f"{section}.account.user"] == "me"
        assert shown[f"{section}.account.password"] == MASK
        assert shown[f"{section}.more"] == [{"user": "you", "password": MASK}]
        assert shown[f"{section}.keys"] == [MASK]


def test_secrets_of_auth_providers_are_masked() -> None:
    registry = PluginRegistry()
    registry.add("auth provider", Registration(name="far", factory=object, settings=Remote), Distribution("acme", "1.0"))
    values = {"account": {"user": "me", "password": "s3cr3t"}, "keys": ["s3cr3t"]}
    settings = {"far": values, "unknown": {"anything": "s3cr3t"}}
    loaded = load_settings(overrides={"auth": {"providers": ["far"], "settings": settings}}, environ={})
    effective = effective_values(loaded, registry)
    assert "s3cr3t" not in as_json(loaded, effective)
    shown = {dotted(item.path): item.value for item in effective}
    assert shown["auth.settings.far.account.user"] == "me"
    assert shown["auth.settings.far.account.password"] == MASK
    assert shown["auth.settings.unknown.anything"] == MASK  # nobody can say what it is
