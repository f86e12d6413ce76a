"""Settings of the auth provider `api_keys` (`auth.settings.api_keys`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, model_validator

from inferflux_core.access.keys.form import is_env
from inferflux_core.access.keys.records import KeyTerms
from inferflux_core.settings import Group

STATIC_HASH = re.compile(r"hmac-sha256:([A-Za-z0-9.-]{1,32}):([0-9A-Za-z]{12}):([0-9a-f]{64})")
"""What the configuration may hold of a key: the pepper's id, the key's id, the hash."""


def _pepper_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,32}", text):
        raise ValueError(f"{text!r} must be 1 to 32 of the characters A-Z a-z 0-9 . -")
    return text


def _env(text: str) -> str:
    if not is_env(text):
        raise ValueError(f"{text!r} must be 1 to 16 lower-case letters and digits, a letter first")
    return text


PepperId = Annotated[str, AfterValidator(_pepper_id)]


class PreviousPepper(Group):
    """A pepper that new keys are not made with any more."""

    id: PepperId = Field(description="Its `pepper_id` when it was the current one.")
    pepper: SecretStr | None = Field(None, description="The pepper, at least 32 bytes.")
    pepper_file: Path | None = Field(None, description="File that holds it; only this user may read it.")

    @model_validator(mode="after")
    def _one_source(self) -> PreviousPepper:
        if (self.pepper is None) == (self.pepper_file is None):
            raise ValueError("name either pepper or pepper_file")
        return self


class StaticKey(KeyTerms):
    """A key of the configuration. It is changed and revoked there, with a restart; the admin API does not show it."""

    hash: str | None = Field(None, description="As `inferctl admin api-keys hash` prints it.")
    env: str | None = Field(None, description="Environment variable that holds the whole key, instead of `hash`.")

    @model_validator(mode="after")
    def _one_source(self) -> StaticKey:
        if (self.hash is None) == (self.env is None):
            raise ValueError("name either hash or env")
        if self.hash is not None and not STATIC_HASH.fullmatch(self.hash):
            # Not quoted: it may be a whole key that somebody put into the wrong place.
            raise ValueError(
                "hash is not as 'inferctl admin api-keys hash' prints it: 'hmac-sha256:<pepper>:<id>:<64 hex digits>'"
            )
        return self


class ApiKeySettings(Group):
    """API keys of this server, kept as keyed hashes in a file of its own."""

    pepper: SecretStr | None = Field(
        None, description="Secret of at least 32 bytes that keys are hashed with. Replicas that share keys share it."
    )
    pepper_file: Path | None = Field(
        None,
        description="File that holds it; only this user may read it. By default `pepper` in the state folder, made if missing.",
    )
    pepper_id: PepperId = Field("p1", description="Name of the current pepper; give a new pepper a new name.")
    previous_peppers: tuple[PreviousPepper, ...] = Field(
        (), description="Earlier peppers: keys made with them stay valid until they are rotated or the pepper leaves this list."
    )
    store: Path | None = Field(
        None, description="SQLite file of keys; by default `access.db` in the state folder. No network drive."
    )
    key_env: Annotated[str, AfterValidator(_env)] = Field(
        "live", description="Word in the keys made here, `ifx_<env>_...`, that tells where a leaked one belongs."
    )
    keys: tuple[StaticKey, ...] = Field((), description="Keys of the configuration, beside those of the store.")

    @model_validator(mode="after")
    def _peppers(self) -> ApiKeySettings:
        if self.pepper is not None and self.pepper_file is not None:
            raise ValueError("name either pepper or pepper_file")
        ids = [self.pepper_id, *(old.id for old in self.previous_peppers)]
        if len(set(ids)) < len(ids):
            raise ValueError("pepper_id and the ids of previous_peppers must differ; give the new pepper a new name")
        return self
