"""The public keys of an issuer, and the one thing they are for: checking signatures."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwa import JWSAlgModel
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey, import_key

from inferflux_auth_oidc.compact_token import CompactToken
from inferflux_auth_oidc.refusal import Refusal

_MAX_KEYS = 100
_RSA_BITS = range(2048, 8193)  # below is weak, above takes long to check
_MAX_RSA_EXPONENT = 4  # base64url characters: 24 bits; a large one takes long to check
_PRIVATE_PARTS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
# What a malformed key can make joserfc and cryptography raise.
_MALFORMED = (JoseError, ValueError, TypeError, KeyError, ArithmeticError, UnsupportedAlgorithm)


class _Registry(jws.JWSRegistry):
    """Algorithms of one issuer. Header parameters unknown to joserfc are ignored, as RFC 7515 says."""

    def __init__(self, algorithms: Collection[str]) -> None:
        super().__init__(algorithms=algorithms, strict_check_header=False)

    def get_alg(self, name: str) -> JWSAlgModel:
        # Not the base's: that warns at each EdDSA token, which RFC 9864 renames to Ed25519 and many providers still issue.
        if self.allowed is None or name not in self.allowed:
            raise UnsupportedAlgorithmError(f"Algorithm of '{name}' is not allowed")
        return self.algorithms[name]


class SignatureCheck:
    """Checks signatures with the algorithms that one issuer may use."""

    def __init__(self, algorithms: Collection[str]) -> None:
        self._registry = _Registry(frozenset(algorithms))

    def check(self, token: CompactToken, keys: Sequence[Key]) -> None:
        """Check the signature of a token.

        Args:
            keys: those with the token's `kid`; the first that its algorithm can use decides.

        Raises:
            Refusal: `token_key` if none of them is for this algorithm, `token_signature` if it is not signed by it.
        """
        try:
            key = next((key for key in keys if self._fits(key, token.algorithm)), None)
            if key is None:
                raise Refusal("token_key")
            signed = jws.extract_compact(token.text.encode("ascii"), registry=self._registry)
            valid = jws.validate_compact(signed, key, registry=self._registry)
        except (*_MALFORMED, RecursionError):
            raise Refusal("token_signature") from None
        if valid is not True:
            raise Refusal("token_signature")

    def _fits(self, key: Key, algorithm: str) -> bool:
        try:
            self._registry.get_alg(algorithm).check_key(key)
            key.check_key_op("verify")
        except JoseError:
            return False
        return True


def read_key_set(document: Mapping[str, Any]) -> dict[str, list[Key]]:
    """The keys of a JWKS that signatures can be checked with, by `kid`.

    Left out: symmetric keys, keys whose private half is published, keys for encryption, keys without `kid`, weak or oversized
    RSA keys, and kinds that are not understood (RFC 7517, section 5).

    Raises:
        ValueError: there is none left, or the document is no key set.
    """
    entries = document.get("keys")
    if not isinstance(entries, list) or not entries:
        raise ValueError("no keys in the key set")
    if len(entries) > _MAX_KEYS:
        raise ValueError(f"more than {_MAX_KEYS} keys in the key set")
    keys: dict[str, list[Key]] = {}
    for entry in entries:
        if (key := _read_key(entry)) is not None and key.kid is not None:
            keys.setdefault(key.kid, []).append(key)
    if not keys:
        raise ValueError("no usable key in the key set")
    return keys


def _read_key(entry: object) -> Key | None:
    if not isinstance(entry, dict) or not _PRIVATE_PARTS.isdisjoint(entry):
        return None
    kid, kind, use = entry.get("kid"), entry.get("kty"), entry.get("use", "sig")
    if not isinstance(kid, str) or not kid or use != "sig" or kind not in ("RSA", "EC", "OKP"):
        return None
    if kind == "RSA" and not _moderate_rsa(entry):
        return None
    try:
        key = import_key(entry)
    except _MALFORMED:
        return None
    return key if isinstance(key, RSAKey | ECKey | OKPKey) and not key.is_private else None


def _moderate_rsa(entry: Mapping[str, Any]) -> bool:
    """Looked at before it is imported, since joserfc only warns of a weak key."""
    modulus, exponent = entry.get("n"), entry.get("e")
    if not isinstance(modulus, str) or not isinstance(exponent, str) or len(exponent) > _MAX_RSA_EXPONENT:
        return False
    try:
        number = base64.urlsafe_b64decode(modulus + "=" * (-len(modulus) % 4))
    except ValueError:
        return False
    return int.from_bytes(number, "big").bit_length() in _RSA_BITS
