"""How this server proves itself to an issuer: `client_secret_basic` (RFC 6749) or `private_key_jwt` (RFC 7523)."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote_plus

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwa import JWSAlgModel
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from inferflux_auth_oidc.settings import IntrospectionSettings
from inferflux_core.errors import ConfigError

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ASSERTION_LIFE = 60  # seconds
_KINDS: dict[str, type[RSAKey] | type[ECKey] | type[OKPKey]] = {"RS": RSAKey, "PS": RSAKey, "ES": ECKey, "Ed": OKPKey}


@dataclass(frozen=True, slots=True)
class Proof:
    """What a request carries to prove who sends it. Its repr does not show it."""

    headers: dict[str, str] = field(default_factory=dict, repr=False)
    form: dict[str, str] = field(default_factory=dict, repr=False)


class ClientProof:
    """Makes the proof of one client, a new one for each request."""

    def __init__(self, settings: IntrospectionSettings, issuer: str, now: Callable[[], float]) -> None:
        """
        Raises:
            ConfigError: the secret or the key is not there or no use. Names the place, never the content.
        """
        self._settings = settings
        self._issuer = issuer
        self._now = now
        self._key: Key | None = None
        self._basic = ""
        if settings.private_key_file is not None:
            self._key = self._read_key(settings.private_key_file)
            self.make()  # an algorithm that does not fit the key is found now
        else:
            # RFC 6749 section 2.3.1: both are form-encoded first.
            pair = f"{quote_plus(settings.client_id)}:{quote_plus(_secret(settings))}"
            self._basic = "Basic " + base64.b64encode(pair.encode()).decode("ascii")

    def make(self) -> Proof:
        """A proof for one request."""
        if self._key is None:
            return Proof(headers={"Authorization": self._basic})
        now = int(self._now())
        claims = {
            "iss": self._settings.client_id,
            "sub": self._settings.client_id,
            "aud": self._issuer,
            "iat": now,
            "exp": now + _ASSERTION_LIFE,
            "jti": secrets.token_urlsafe(16),
        }
        header = {"alg": self._settings.private_key_algorithm, "typ": "JWT"}
        if self._settings.private_key_id is not None:
            header["kid"] = self._settings.private_key_id
        try:
            assertion = jwt.encode(header, claims, self._key, registry=_signing)
        except (JoseError, ValueError, TypeError) as error:
            raise ConfigError(
                f"introspection.private_key_file {str(self._settings.private_key_file)!r} cannot sign with "
                f"{self._settings.private_key_algorithm!r} ({type(error).__name__}); set private_key_algorithm to fit the key"
            ) from None
        return Proof(form={"client_assertion_type": _ASSERTION_TYPE, "client_assertion": assertion})

    def _read_key(self, path: Path) -> Key:
        kind = _KINDS[self._settings.private_key_algorithm[:2]]
        try:
            key = kind.import_key(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"introspection.private_key_file {str(path)!r} cannot be read: {error.strerror}") from None
        except (JoseError, ValueError, TypeError):
            key = None
        if key is None or not key.is_private:
            raise ConfigError(
                f"introspection.private_key_file {str(path)!r} is no unencrypted PEM private key for "
                f"{self._settings.private_key_algorithm!r}; name another file or set private_key_algorithm"
            )
        return key


class _SigningRegistry(jws.JWSRegistry):
    """Signs with what the settings say, without the warning about the older name of Ed25519."""

    def get_alg(self, name: str) -> JWSAlgModel:
        return self.algorithms[name]


_signing = _SigningRegistry()


def _secret(settings: IntrospectionSettings) -> str:
    if settings.client_secret is not None:
        secret, place = settings.client_secret.get_secret_value(), "introspection.client_secret"
    elif settings.client_secret_env is not None:
        secret, place = os.environ.get(settings.client_secret_env, ""), f"environment variable {settings.client_secret_env!r}"
    else:
        assert settings.client_secret_file is not None
        place = f"introspection.client_secret_file {str(settings.client_secret_file)!r}"
        try:
            secret = settings.client_secret_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{place} cannot be read: {type(error).__name__}; name a readable text file") from None
    if not secret:
        raise ConfigError(f"the {place} is empty; put the client's secret there")
    return secret
