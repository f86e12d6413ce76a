"""What is done to the key store on the server's own host, without the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from inferflux_core.access.keys.form import PREFIX, new_key, parse_key
from inferflux_core.access.keys.pepper import load_pepper
from inferflux_core.access.keys.records import NewKey, key_public
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.keys.static import static_hash
from inferflux_core.config import load_settings
from inferflux_core.errors import ConfigError, RequestError
from inferflux_core.plugins import load_plugins
from inferflux_core.serving.validation import first_error
from inferflux_core.settings import Settings
from inferflux_core.state_dir import state_dir

PROVIDER = "api_keys"


def bootstrap_key(body: dict[str, Any], config_file: Path | None) -> dict[str, Any]:
    """Make a key in the store that the configuration names; a running server accepts it at once.

    The audit log, which belongs to the server's process, does not have it.

    Raises:
        click.ClickException: the body or the configuration is wrong, or the store cannot be used.
    """
    with _problems():
        try:
            new = NewKey.model_validate(body)
        except ValidationError as error:
            raise first_error(error) from None
        settings, keys = _configured(config_file)
        if PROVIDER not in settings.auth.providers:
            click.echo("Note: auth.providers does not name 'api_keys', so that the server will not accept the key.", err=True)
        with closing(open_keys(keys, state_dir(settings))) as ring:
            record, key = asyncio.run(ring.create(new))
        if settings.policy.file is not None and not new.roles:
            click.echo("Note: there is a policy file; the key may do what it allows this key or its roles (--role).", err=True)
    return {**key_public(record), "key": key}


def make_key(config_file: Path | None) -> str:
    """A key for the configuration to hold; it is kept nowhere. Raises click.ClickException as `bootstrap_key`."""
    with _problems():
        return new_key(_configured(config_file)[1].key_env)[1]


def hash_of(key: str, config_file: Path | None) -> str:
    """What the configuration may hold of a key. Raises click.ClickException, also for what is no key."""
    with _problems():
        if parse_key(key) is None:
            raise ConfigError(
                f"this is no key: those begin with {PREFIX!r} and end with a checksum; copy it again, or use --new"
            )
        settings, keys = _configured(config_file)
        return static_hash(key, load_pepper(keys, state_dir(settings)))


def _configured(config_file: Path | None) -> tuple[Settings, ApiKeySettings]:
    settings = load_settings(config_file).settings
    registry = load_plugins(settings.plugins.blocked)
    keys = registry.settings("auth provider", PROVIDER, settings.auth.settings.get(PROVIDER, {}))
    assert isinstance(keys, ApiKeySettings)
    return settings, keys


class _Refused(click.ClickException):
    """The configuration, or what was asked for, is wrong."""

    exit_code = 2


@contextmanager
def _problems() -> Iterator[None]:
    """Errors as the command line shows them: exit code 2 for a wrong configuration or request, 1 for a store that fails."""
    try:
        yield
    except ConfigError as error:
        raise _Refused(str(error)) from error
    except RequestError as error:
        raise (_Refused if error.status == 400 else click.ClickException)(str(error)) from error
