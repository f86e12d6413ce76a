"""Tokens as an issuer makes them, and as an attacker would."""

from __future__ import annotations

import base64
import functools
import json
from typing import Any

from joserfc import jws
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey

NOW = 1_800_000_000.0  # Unix seconds at which the tests' clock starts
RESOURCE = "https://llm.example.com"
ALGORITHMS = jws.JWSRegistry.algorithms  # looked up directly, so that EdDSA does not warn

Json = dict[str, Any]


@functools.cache
def rsa_key(kid: str = "rsa") -> RSAKey:
    return RSAKey.generate_key(2048, parameters={"kid": kid})


@functools.cache
def ec_key(kid: str = "ec") -> ECKey:
    return ECKey.generate_key("P-256", parameters={"kid": kid, "alg": "ES256", "use": "sig"})


@functools.cache
def ed_key(kid: str = "ed") -> OKPKey:
    return OKPKey.generate_key("Ed25519", parameters={"kid": kid, "use": "sig"})


def key_set(*keys: Key) -> Json:
    """The public halves, as a JWKS."""
    return {"keys": [dict(key.as_dict(private=False)) for key in keys]}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def claims(issuer: str, **changes: Any) -> Json:
    """Claims of a good token; a change to `...` leaves the claim out."""
    good: Json = {
        "iss": issuer,
        "aud": RESOURCE,
        "sub": "alice",
        "iat": NOW - 10,
        "exp": NOW + 600,
        "scope": "infer:generate openid",
        "tenant": "t1",
        "roles": ["user"],
        # Has `-` and `_` in base64url, so that the other alphabet makes another token.
        "note": "~~~???>>>",
    }
    return _changed(good, changes)


def header(**changes: Any) -> Json:
    return _changed({"alg": "RS256", "kid": "rsa", "typ": "at+jwt"}, changes)


def _changed(good: Json, changes: Json) -> Json:
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def sign(head: Json | bytes, payload: Json | bytes, key: Key | None = None, algorithm: str | None = None) -> str:
    """A token with this header and payload, signed with the key for real, whatever the header says.

    Args:
        key: by default the RSA key.
        algorithm: by default the header's `alg`, or RS256 if that is none for the key.
    """
    key = rsa_key() if key is None else key
    named = head.get("alg") if isinstance(head, dict) else None
    if algorithm is None:
        fits = isinstance(named, str) and named in ALGORITHMS and ALGORITHMS[named].key_type == key.key_type
        algorithm = named if fits and isinstance(named, str) and named != "none" else "RS256"
    parts = [part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode() for part in (head, payload)]
    signed = ".".join(b64(part) for part in parts)
    return f"{signed}.{b64(ALGORITHMS[algorithm].sign(signed.encode(), key))}"


def token(issuer: str, **changes: Any) -> str:
    """A good access token, but for these claims."""
    return sign(header(), claims(issuer, **changes))


def hmac_with_public_pem(issuer: str) -> str:
    """HS256 with the public key's PEM as the secret: good for a verifier that lets the token choose the algorithm."""
    secret = OctKey.import_key(base64.urlsafe_b64encode(rsa_key().as_pem(private=False)))
    return sign(header(alg="HS256"), claims(issuer), secret, "HS256")
