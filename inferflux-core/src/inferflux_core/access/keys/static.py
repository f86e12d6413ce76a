"""Keys of the configuration: hashed there, or in an environment variable that a secret manager sets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from inferflux_core.access.keys.form import PREFIX, parse_key
from inferflux_core.access.keys.pepper import Pepper, SecretHash
from inferflux_core.access.keys.records import KeyRecord
from inferflux_core.access.keys.settings import STATIC_HASH, StaticKey
from inferflux_core.errors import ConfigError


def static_hash(key: str, pepper: Pepper) -> str:
    """What the configuration may hold of a key: `hmac-sha256:<pepper's id>:<key's id>:<hex>`. It is no credential.

    Raises:
        ConfigError: it is not a whole key.
    """
    parsed = parse_key(key)
    if parsed is None:
        raise ConfigError(f"that is not a whole key '{PREFIX}<env>_<id>_<secret>'; copy all of it, or make another one")
    secret = pepper.hash(key)
    return f"hmac-sha256:{secret.pepper_id}:{parsed.id}:{secret.hash.hex()}"


def read_static_keys(
    keys: Iterable[StaticKey], pepper: Pepper, environment: Mapping[str, str] = os.environ
) -> dict[str, tuple[KeyRecord, SecretHash]]:
    """The configured keys by their ids.

    Raises:
        ConfigError: a variable is missing or holds no key, a pepper is not known, or two keys have one id. It never quotes
            what a variable holds.
    """
    found: dict[str, tuple[KeyRecord, SecretHash]] = {}
    for key in keys:
        key_id, secret = _from_variable(key, pepper, environment) if key.env is not None else _from_hash(key, pepper)
        if key_id in found:
            raise ConfigError(f"the static keys {found[key_id][0].name!r} and {key.name!r} have one id; remove one of them")
        expires_at = None if key.expires_at is None else key.expires_at.timestamp()
        found[key_id] = (KeyRecord.of(key, key_id, created_at=time.time(), expires_at=expires_at), secret)
    return found


def _from_hash(key: StaticKey, pepper: Pepper) -> tuple[str, SecretHash]:
    match = STATIC_HASH.fullmatch(key.hash or "")
    assert match is not None  # the settings were validated
    pepper_id, key_id, digest = match.groups()
    if pepper_id not in pepper.ids:
        raise ConfigError(
            f"the static key {key.name!r} was hashed with the pepper {pepper_id!r}, which is not configured; "
            f"add it to previous_peppers, or hash the key again"
        )
    return key_id, SecretHash(pepper_id, bytes.fromhex(digest))


def _from_variable(key: StaticKey, pepper: Pepper, environment: Mapping[str, str]) -> tuple[str, SecretHash]:
    assert key.env is not None
    text = environment.get(key.env)
    if not text:
        raise ConfigError(f"the variable {key.env!r} of the static key {key.name!r} is not set; set it to the whole key")
    parsed = parse_key(text.strip())
    if parsed is None:
        raise ConfigError(
            f"the variable {key.env!r} of the static key {key.name!r} does not hold a whole key "
            f"'{PREFIX}<env>_<id>_<secret>'; set it to one that InferFlux made, all of it"
        )
    return parsed.id, pepper.hash(text.strip())
