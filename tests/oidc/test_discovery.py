"""The issuer's metadata: where they are looked for, how long they are believed, whom they may name."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from oidc.checked import checking
from oidc.hostile_provider import DISCOVERY, JWKS, HostileProvider, hostile_provider
from oidc.tokens import NOW, claims, header, key_set, rsa_key, sign, token

DAY = timedelta(days=1)


@pytest.fixture
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


async def test_an_issuer_with_a_path_is_found_at_both_places(issuer: HostileProvider) -> None:
    tenant = issuer.url + "/realms/main"
    oauth = "/.well-known/oauth-authorization-server/realms/main"
    issuer.replies[oauth] = issuer.json(issuer.metadata(issuer=tenant))
    async with checking({"issuer": tenant}) as checked:
        assert await checked.verdict(token(tenant)) == "accepted"
    assert [path for _, path, _, _ in issuer.requests] == ["/realms/main" + DISCOVERY, oauth, JWKS]


async def test_the_second_place_is_not_asked_when_the_first_one_fails(issuer: HostileProvider) -> None:
    issuer.replies[DISCOVERY] = issuer.body(b"", status=500)
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(token(issuer.url)) == "unavailable"
    assert [path for _, path, _, _ in issuer.requests] == [DISCOVERY]


async def test_an_issuer_that_ends_in_a_slash_is_taken_as_it_is(issuer: HostileProvider) -> None:
    issuer.replies[DISCOVERY] = issuer.json(issuer.metadata(issuer=issuer.url + "/"))
    async with checking({"issuer": issuer.url + "/"}) as checked:
        assert await checked.verdict(token(issuer.url + "/")) == "accepted"
        assert await checked.verdict(token(issuer.url)) == "token_issuer"


async def test_metadata_are_kept_for_an_hour(issuer: HostileProvider) -> None:
    good = token(issuer.url, exp=NOW + 100_000)
    async with checking({"issuer": issuer.url}) as checked:
        for _ in range(12):  # at 0, 301, ... 3311 s
            assert await checked.verdict(good) == "accepted"
            checked.clock.advance(301)
        assert (issuer.fetches(DISCOVERY), issuer.fetches(JWKS)) == (1, 12)
        assert await checked.verdict(good) == "accepted"
        assert (issuer.fetches(DISCOVERY), issuer.fetches(JWKS)) == (2, 13)


async def test_metadata_are_read_again_when_what_they_named_fails(issuer: HostileProvider) -> None:
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(token(issuer.url)) == "accepted"
        issuer.replies[JWKS] = issuer.body(b"", status=404)
        issuer.replies["/moved"] = issuer.json(key_set(rsa_key("new")))
        issuer.replies[DISCOVERY] = issuer.json(issuer.metadata(jwks_uri=issuer.url + "/moved"))
        rotated = sign(header(kid="new"), claims(issuer.url), rsa_key("new"))
        assert await checked.verdict(rotated) == "unavailable"
        checked.clock.advance(30)
        assert await checked.verdict(rotated) == "accepted"
        assert (issuer.fetches(DISCOVERY), issuer.fetches("/moved")) == (2, 1)


async def test_keys_on_another_origin_need_to_be_configured(issuer: HostileProvider) -> None:
    with hostile_provider() as elsewhere:
        issuer.replies[DISCOVERY] = issuer.json(issuer.metadata(jwks_uri=elsewhere.url + JWKS))
        async with checking({"issuer": issuer.url}) as checked:
            assert await checked.verdict(token(issuer.url)) == "unavailable"
        async with checking({"issuer": issuer.url, "jwks_uri": elsewhere.url + JWKS}) as checked:
            assert await checked.verdict(token(issuer.url)) == "accepted"
        assert elsewhere.fetches() == 1


async def test_requests_carry_nothing_of_the_caller_and_no_cookie(issuer: HostileProvider) -> None:
    issuer.replies[DISCOVERY] = issuer.body(b"{}", status=404, headers={"Set-Cookie": "a=b"})
    issuer.replies["/.well-known/oauth-authorization-server"] = issuer.json(issuer.metadata())
    good = token(issuer.url)
    async with checking({"issuer": issuer.url}) as checked:
        assert await checked.verdict(good) == "accepted"
    for _, _, headers, _ in issuer.requests:
        assert {name.lower() for name in headers} <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
        assert headers["Accept-Encoding"] == "identity"


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A new certificate for 127.0.0.1 that vouches for itself: its file, and the context of a server that has it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "login")])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), today - DAY, today + DAY)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(made.public_bytes(Encoding.PEM))
    secret = folder / "key.pem"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, secret)
    return file, context


async def test_an_issuer_must_prove_that_it_is_the_one(tmp_path: Path) -> None:
    file, context = certificate(tmp_path)
    with hostile_provider(context) as issuer:
        async with checking({"issuer": issuer.url}) as checked:  # an authority that does not vouch for it
            assert await checked.verdict(token(issuer.url)) == "unavailable"
        assert issuer.requests == []
        async with checking({"issuer": issuer.url}, ca_file=file) as checked:
            assert await checked.verdict(token(issuer.url)) == "accepted"
        elsewhere = issuer.url.replace("127.0.0.1", "localhost")
        async with checking({"issuer": elsewhere}, ca_file=file) as checked:
            assert await checked.verdict(token(elsewhere)) == "unavailable"
