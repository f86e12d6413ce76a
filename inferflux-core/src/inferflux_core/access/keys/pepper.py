"""The pepper: a secret beside the store, without which what the store holds of keys is of no use to anybody.

The store keeps HMAC-SHA256(pepper, whole key). A slow hash would add nothing, since nobody guesses 256 random bits, and
would be a lever to overload the server. Who can write to the store but does not know the pepper cannot make a key.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pydantic import SecretStr

from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.errors import ConfigError
from inferflux_core.private_files import create_private, make_private_folder, read_private

MIN_BYTES = 32
MAX_HASHES = 2
"""Secrets of one key that can be valid at one time: its own, and the one before it until the overlap ends."""

_CHECK = b"inferflux: which pepper is this"  # no key has this form


@dataclass(frozen=True, slots=True)
class SecretHash:
    """What is kept of a key's secret.

    Attributes:
        valid_until: Unix seconds at which the overlap after a rotation ends; None for the key's current secret.
    """

    pepper_id: str
    hash: bytes = field(repr=False)
    valid_until: float | None = None


class Pepper:
    """The current pepper, with which new keys are hashed, and previous ones, which keep older keys valid.

    Raises:
        ConfigError: a pepper is shorter than 32 bytes.
    """

    __slots__ = ("_dummy", "_secrets", "id")

    def __init__(self, pepper_id: str, secret: bytes, previous: Mapping[str, bytes] = MappingProxyType({})) -> None:
        self.id = pepper_id
        self._secrets = {**previous, pepper_id: secret}
        for name, value in self._secrets.items():
            if len(value) < MIN_BYTES:
                raise ConfigError(
                    f"the pepper {name!r} has {len(value)} bytes, fewer than {MIN_BYTES}; make one with: openssl rand -hex 32"
                )
        self._dummy = SecretHash(pepper_id, os.urandom(32))

    def __repr__(self) -> str:
        return f"Pepper({self.id!r})"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._secrets)

    def hash(self, key: str) -> SecretHash:
        """What to keep of a new key."""
        return SecretHash(self.id, self._digest(self.id, key))

    def match(self, key: str, hashes: Sequence[SecretHash]) -> SecretHash | None:
        """That of up to `MAX_HASHES` hashes which is of this key, or None.

        Always the same work, two HMACs and two comparisons in constant time, whether there are hashes or not.
        """
        found = None
        for index in range(MAX_HASHES):
            given = hashes[index] if index < len(hashes) else self._dummy
            candidate = given if given.pepper_id in self._secrets else self._dummy
            same = hmac.compare_digest(self._digest(candidate.pepper_id, key), candidate.hash)
            if same and candidate is not self._dummy:
                found = candidate
        return found

    def check_value(self, pepper_id: str) -> bytes:
        """By which a store recognises the pepper that its keys were made with."""
        return hmac.digest(self._secrets[pepper_id], _CHECK, "sha256")

    def _digest(self, pepper_id: str, key: str) -> bytes:
        return hmac.digest(self._secrets[pepper_id], key.encode("ascii"), "sha256")


def load_pepper(settings: ApiKeySettings, state_dir: Path) -> Pepper:
    """The peppers that the settings name; the one in the state folder is made if there is none.

    Raises:
        ConfigError: one cannot be read, is too short, or others may read its file.
    """
    if settings.pepper is None and settings.pepper_file is None:
        path = state_dir / "pepper"
        if not path.exists():
            make_private_folder(state_dir)
            create_private(path, secrets.token_hex(32).encode() + b"\n")
        current = _from_file(path)
    else:
        current = _secret(settings.pepper, settings.pepper_file)
    previous = {old.id: _secret(old.pepper, old.pepper_file) for old in settings.previous_peppers}
    return Pepper(settings.pepper_id, current, previous)


def _secret(text: SecretStr | None, path: Path | None) -> bytes:
    if text is not None:
        return text.get_secret_value().encode("utf-8")
    assert path is not None  # the settings have one of the two
    return _from_file(path)


def _from_file(path: Path) -> bytes:
    """A line break at the end is not part of it, so that `openssl rand -hex 32 > pepper` makes what it prints."""
    return read_private(path, "the pepper file").rstrip(b"\r\n")
