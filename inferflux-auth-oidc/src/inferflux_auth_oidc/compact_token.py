"""A JSON Web Token as it arrives, taken apart. Nothing here is believed yet.

base64url(header) "." base64url(payload) "." base64url(signature)
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

from inferflux_auth_oidc.refusal import Refusal
from inferflux_auth_oidc.strict_json import parse_object

MAX_TOKEN = 16 * 1024  # characters
MAX_OPAQUE_TOKEN = 4 * 1024  # characters; opaque ones are names of something at the issuer, and are sent there
MAX_HEADER = 512  # characters of the header segment; joserfc's own cap, below the 8 KiB that would do
MAX_SIGNATURE = 1024  # characters, as joserfc's cap; RSA of 6,144 bits

_SEGMENT = r"[A-Za-z0-9_-]+"
_THREE_PARTS = re.compile(rf"{_SEGMENT}\.{_SEGMENT}\.{_SEGMENT}")
# JWE in compact form; the encrypted key may be empty.
_FIVE_PARTS = re.compile(r"(?:[A-Za-z0-9_-]*\.){4}[A-Za-z0-9_-]*")
# Header parameters by which a token would bring or name its own key, or change what is signed or how it is to be read.
_FORBIDDEN = frozenset({"jwk", "jku", "x5u", "crit", "b64"})


@dataclass(frozen=True, slots=True)
class CompactToken:
    """A token with a well-formed header and payload, and a signature that nobody has looked at.

    Attributes:
        text: the token.
        algorithm: `alg`; a string, not yet known to be allowed.
        key_id: `kid`.
        type: `typ` in lower case; empty if there is none.
        claims: the payload.
    """

    text: str
    algorithm: str
    key_id: str
    type: str
    claims: dict[str, Any]

    @property
    def issuer(self) -> object:
        """`iss` as the token claims it, of any type."""
        return self.claims.get("iss")


def has_jwt_form(text: str) -> bool:
    """Whether it is three parts of base64url; anything else is opaque."""
    return _THREE_PARTS.fullmatch(text) is not None


def has_jwe_form(text: str) -> bool:
    """Whether it is five parts of base64url: an encrypted token, which this server has no key for."""
    return _FIVE_PARTS.fullmatch(text) is not None


def check_length(text: str) -> None:
    """Raises Refusal if there is nothing, or more than a token of this form needs."""
    if not text or len(text) > MAX_TOKEN or (len(text) > MAX_OPAQUE_TOKEN and not has_jwt_form(text)):
        raise Refusal("token_length")


def take_apart(text: str) -> CompactToken:
    """Read a token that has the form of a JWT.

    Raises:
        Refusal: `token_length`, `token_malformed`, `token_header`, or `token_key` without a usable `kid`.
    """
    check_length(text)
    if not has_jwt_form(text):
        raise Refusal("token_malformed")
    header_segment, payload_segment, signature_segment = text.split(".")
    if len(header_segment) > MAX_HEADER or len(signature_segment) > MAX_SIGNATURE:
        raise Refusal("token_length")
    header = _object(header_segment)
    algorithm, key_id, typ = header.get("alg"), header.get("kid"), header.get("typ", "")
    if not isinstance(algorithm, str) or not isinstance(typ, str) or not _FORBIDDEN.isdisjoint(header):
        raise Refusal("token_header")
    if not isinstance(key_id, str) or not key_id:
        raise Refusal("token_key")
    return CompactToken(text, algorithm, key_id, typ.lower(), _object(payload_segment))


def _object(segment: str) -> dict[str, Any]:
    try:
        return parse_object(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except ValueError:
        raise Refusal("token_malformed") from None
