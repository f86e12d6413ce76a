"""Tokens that must be refused, each good but for one thing, with the reason; and those that must be accepted."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from joserfc.jwk import ECKey, RSAKey

from oidc.tokens import NOW, RESOURCE, b64, claims, ec_key, ed_key, header, hmac_with_public_pem, sign, token


@dataclass(frozen=True)
class Case:
    """One token.

    Attributes:
        make: makes it for an issuer.
        reason: why it is refused.
        issuer: settings of the issuer beyond its URL.
    """

    name: str
    make: Callable[[str], str]
    reason: str
    issuer: dict[str, Any] = field(default_factory=dict)


def _claim(name: str, value: object, reason: str, label: str, **issuer: Any) -> Case:
    return Case(f"{name} {label}", lambda url: token(url, **{name: value}), reason, issuer)


def _raw(name: str, pattern: str, replacement: str, reason: str, label: str) -> Case:
    """A claim written as text, for what `json` would not write."""

    def make(url: str) -> str:
        text, count = re.subn(pattern, replacement, json.dumps(claims(url)))
        assert count == 1
        return sign(header(), text.encode())

    return Case(f"{name} {label}", make, reason)


def _header(label: str, reason: str, **changes: Any) -> Case:
    return Case(label, lambda url: sign(header(**changes), claims(url)), reason)


def _after(label: str, suffix: str) -> Case:
    return Case(f"{label} after the signature", lambda url: token(url) + suffix, "token_malformed")


def _parts(label: str, change: Callable[[list[str]], list[str]], reason: str) -> Case:
    return Case(label, lambda url: ".".join(change(token(url).split("."))), reason)


def _flip(segment: str) -> str:
    """Another first character."""
    return ("B" if segment[0] != "B" else "C") + segment[1:]


def _standard_alphabet(url: str) -> str:
    text = token(url)
    assert "-" in text.split(".")[1] or "_" in text.split(".")[1]
    return text.replace("-", "+").replace("_", "/")


def _not_canonical(url: str) -> str:
    """The last character of 256 bytes carries 4 bits that nobody reads; here they are not zero."""
    text = token(url)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + alphabet[alphabet.index(text[-1]) + 1]


def _deep(depth: int, reason: str) -> Case:
    payload = b'{"x":' + b"[" * depth + b"]" * depth + b"}"
    return Case(f"payload {depth} deep", lambda url: sign(header(), payload), reason)


def _stranger() -> RSAKey:
    return RSAKey.generate_key(2048)


REFUSED = [
    *(
        Case(
            f"alg {name}",
            lambda url, name=name: sign(header(alg=name), claims(url)),  # type: ignore[misc]  # mypy: default in a lambda
            "token_algorithm",
        )
        for name in ("none", "None", "NONE", "nOnE", "RS1", "rs256", "HS256", "ES256K", "")
    ),
    Case(
        "alg none without signature",
        lambda url: sign(header(alg="none"), claims(url)).rpartition(".")[0] + ".",
        "token_malformed",
    ),
    Case("HS256 with the public PEM", hmac_with_public_pem, "token_algorithm"),
    Case(
        "jwk in the header",
        # The attacker's own key, which the token is signed with.
        lambda url: sign(header(alg="ES256", jwk=dict(ec_key("evil").as_dict(private=False))), claims(url), ec_key("evil")),
        "token_header",
    ),
    _header("jku in the header", "token_header", jku="https://evil.example/jwks"),
    _header("x5u in the header", "token_header", x5u="https://evil.example/cert"),
    _header("crit unknown", "token_header", crit=["exp"], exp=1),
    _header("crit empty", "token_header", crit=[]),
    _header("b64 false", "token_header", b64=False),
    _header("b64 false and crit", "token_header", b64=False, crit=["b64"]),
    Case(
        "PS256 where RS256 is allowed",
        lambda url: sign(header(alg="PS256"), claims(url)),
        "token_algorithm",
        {"algorithms": ["RS256"]},
    ),
    _header("alg as list", "token_header", alg=["RS256"]),
    _header("alg missing", "token_header", alg=...),
    _header("alg null", "token_header", alg=None),
    _header("kid unknown", "token_key", kid="unknown"),
    _header("kid missing", "token_key", kid=...),
    _header("kid path-like", "token_key", kid="../../../../dev/null"),
    _header("kid integer", "token_key", kid=1),
    _header("kid empty", "token_key", kid=""),
    _header("kid of a key for another algorithm", "token_key", kid="ec"),
    Case("ES256 that names the RSA key", lambda url: sign(header(alg="ES256"), claims(url), ec_key()), "token_key"),
    Case("signed by a stranger", lambda url: sign(header(), claims(url), _stranger()), "token_signature"),
    Case(
        "signed by a stranger's curve",
        lambda url: sign(header(alg="ES256", kid="ec"), claims(url), ECKey.generate_key("P-256")),
        "token_signature",
    ),
    _parts("signature changed", lambda p: [p[0], p[1], _flip(p[2])], "token_signature"),
    _parts("signature cut", lambda p: [p[0], p[1], p[2][:-4]], "token_signature"),
    _parts(
        "payload changed",
        lambda p: [p[0], b64(base64.urlsafe_b64decode(p[1] + "==").replace(b"alice", b"admin")), p[2]],
        "token_signature",
    ),
    Case("signature not canonical", _not_canonical, "token_signature"),
    _claim("aud", "https://other.example.com", "token_audience", "wrong"),
    _claim("aud", RESOURCE[:-1], "token_audience", "a prefix of ours"),
    _claim("aud", RESOURCE + "/", "token_audience", "that begins like ours"),
    _claim("aud", [[RESOURCE]], "token_claims", "nested list"),
    _claim("aud", [RESOURCE, 1], "token_claims", "list with a number"),
    _claim("aud", [], "token_claims", "empty list"),
    _claim("aud", ..., "token_claims", "missing"),
    _claim("aud", {RESOURCE: 1}, "token_claims", "object"),
    Case("iss with trailing slash", lambda url: token(url + "/"), "token_issuer"),
    Case("iss as list", lambda url: token(url, iss=[url]), "token_issuer"),
    _claim("iss", ..., "token_issuer", "missing"),
    _claim("iss", "https://evil.example", "token_issuer", "unknown"),
    _claim("sub", 1, "token_claims", "integer"),
    _claim("sub", "", "token_claims", "empty"),
    _claim("sub", ..., "token_claims", "missing"),
    _claim("sub", "a\nb", "token_claims", "with a line feed"),
    _claim("sub", "a\u202eb", "token_claims", "with a bidirectional control"),
    _claim("sub", "\ud800", "token_claims", "half a surrogate pair"),
    _claim("sub", "a" * 256, "token_claims", "too long"),
    _claim("exp", str(NOW + 600), "token_claims", "string"),
    _claim("exp", True, "token_claims", "true"),
    _claim("exp", None, "token_claims", "null"),
    _claim("exp", ..., "token_claims", "missing"),
    _claim("exp", 10**300, "token_claims", "beyond all calendars"),
    _claim("exp", -1, "token_claims", "negative"),
    _claim("exp", NOW - 31, "token_expired", "past"),
    _raw("exp", r'"exp": [\d.]+', '"exp": NaN', "token_malformed", "NaN"),
    _raw("exp", r'"exp": [\d.]+', '"exp": Infinity', "token_malformed", "Infinity"),
    _raw("exp", r'"exp": [\d.]+', '"exp": 1e400', "token_malformed", "1e400"),
    _raw("exp", r'"exp": [\d.]+', '"exp": ' + "9" * 5000, "token_malformed", "of 5,000 digits"),
    _claim("nbf", NOW + 31, "token_early", "future"),
    _claim("nbf", "0", "token_claims", "string"),
    _claim("iat", NOW + 31, "token_early", "future"),
    _claim("iat", ..., "token_claims", "missing"),
    _claim("iat", NOW - 631, "token_too_old", "long ago", max_token_age_s=600),
    _raw("sub", '"sub": "alice"', '"sub": "alice", "sub": "admin"', "token_malformed", "twice"),
    _raw("sub", '"sub": "alice"', '"sub": "alice", "s\\\\u0075b": "admin"', "token_malformed", "twice, once escaped"),
    Case(
        "alg twice",
        lambda url: sign(b'{"alg":"none","alg":"RS256","kid":"rsa","typ":"at+jwt"}', claims(url)),
        "token_malformed",
    ),
    Case("payload array", lambda url: sign(header(), json.dumps([claims(url)]).encode()), "token_malformed"),
    Case("header array", lambda url: sign(json.dumps([header()]).encode(), claims(url)), "token_malformed"),
    Case("payload not UTF-8", lambda url: sign(header(), b'{"sub":"\xff"}'), "token_malformed"),
    Case("payload with a byte order mark", lambda url: sign(header(), b"\xef\xbb\xbf{}"), "token_malformed"),
    _deep(100_000, "token_length"),
    _deep(5_000, "token_malformed"),
    _after("=", "="),
    _after("newline", "\n"),
    _after("NUL", "\0"),
    _after("non-ASCII", "é"),
    _after("half a surrogate pair", "\udc80"),
    _after("space", " "),
    Case("standard base64", _standard_alphabet, "token_malformed"),
    _parts("2 parts", lambda p: p[:2], "token_malformed"),
    _parts("4 parts", lambda p: [*p, p[2]], "token_malformed"),
    _parts("5 parts", lambda p: [*p, *p[:2]], "token_encrypted"),
    Case("empty", lambda url: "", "token_length"),
    _claim("note", "x" * 13_000, "token_length", "that makes it oversize"),
    _header("header oversize", "token_length", x="x" * 400),
    _header("typ JWT", "token_type", typ="JWT"),
    _header("typ missing", "token_type", typ=...),
    _header("typ integer", "token_header", typ=1),
    *(
        Case(
            f"{name} where typ is not checked",
            lambda url, name=name: sign(header(typ="JWT"), claims(url, **{name: "x"})),  # type: ignore[misc]
            "token_type",
            {"required_typ": allowed},
        )
        for name in ("nonce", "at_hash", "c_hash")
        for allowed in ([], ["JWT"])
    ),
    _claim("azp", "stranger", "token_client", "not allowed", clients=["cli"]),
    _claim("client_id", ["cli"], "token_client", "list", clients=["cli"]),
    _claim("client_id", ..., "token_client", "missing where some are required", clients=["cli"]),
    Case("azp allowed, client_id not", lambda url: token(url, azp="cli", client_id="x"), "token_client", {"clients": ["cli"]}),
    _claim("cnf", {"jkt": "x"}, "token_bound", "of a sender-constrained token"),
    _claim("tenant", "a/b", "token_tenant", "with a slash"),
    _claim("tenant", "t1\n", "token_tenant", "with a line feed"),
    _claim("tenant", "", "token_tenant", "empty"),
    _claim("tenant", ["t1"], "token_tenant", "list"),
    _claim("tenant", ..., "token_tenant", "missing without a default", default_tenant=None),
    _claim("tenant", "t2", "token_tenant", "of somebody else", allowed_tenants=["t1"], default_tenant="t1"),
    _claim("roles", {"user": True}, "token_claims", "object"),
    _claim("roles", ["a\nb"], "token_roles", "with a line feed"),
    _claim("roles", [f"r{i}" for i in range(257)], "token_roles", "too many"),
    _claim("scope", ["infer:admin", 1], "token_claims", "list with a number"),
]

ACCEPTED = [
    Case("as it is", token, ""),
    _claim("aud", ["https://other.example.com", RESOURCE], "", "list that contains ours"),
    _claim("nbf", NOW + 29, "", "within the leeway"),
    _claim("exp", NOW + 0.5, "", "with a fraction"),
    _claim("scope", ..., "", "missing"),
    _claim("azp", "cli", "", "allowed", clients=["cli"]),
    _header("typ in capitals", "", typ="AT+JWT"),
    _header("typ in full", "", typ="application/at+jwt"),
    _header("x5t in the header", "", x5t="abc", pi="unknown parameter"),
    Case("typ JWT where it is allowed", lambda url: sign(header(typ="JWT"), claims(url)), "", {"required_typ": ["JWT"]}),
    Case("no typ where none is required", lambda url: sign(header(typ=...), claims(url)), "", {"required_typ": []}),
    Case("PS256", lambda url: sign(header(alg="PS256"), claims(url)), ""),
    Case("ES256", lambda url: sign(header(alg="ES256", kid="ec"), claims(url), ec_key()), ""),
    Case("EdDSA", lambda url: sign(header(alg="EdDSA", kid="ed"), claims(url), ed_key(), "EdDSA"), ""),
    Case("Ed25519", lambda url: sign(header(alg="Ed25519", kid="ed"), claims(url), ed_key(), "Ed25519"), ""),
]
