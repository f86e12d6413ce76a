"""TLS of the server's port: one `ssl.SSLContext`, or a reason why the server does not start."""

from __future__ import annotations

import datetime
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from inferflux_core.errors import ConfigError
from inferflux_core.private_files import read_private
from inferflux_core.settings import TlsSettings

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

logger = logging.getLogger(__name__)

EXPIRY_WARNING_DAYS = 14

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# Of TLS 1.2 only what keeps past sessions secret when the key gets out, and authenticates what it encrypts.
_CIPHERS_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20"


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """The TLS side of a server, checked so far that a handshake can only fail for what the client does.

    Raises:
        ConfigError: a file is missing, malformed, expired, does not belong to the others, or lets others read the key; names
            the setting, the file, the cause and the cure.
    """
    chain = _certificates("server.tls.certificate", settings.certificate)
    _check_dates(settings.certificate, chain[0])
    key = _private_key(settings.key)
    if key.public_key() != chain[0].public_key():
        _refuse(
            "server.tls.key",
            settings.key,
            f"is not the key of the first certificate in {str(settings.certificate)!r}",
            "set the key that the certificate was requested with, and put the server's own certificate first in its file",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_CIPHERS_1_2)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (ssl.SSLError, OSError) as error:
        _refuse("server.tls.certificate", settings.certificate, f"is refused by OpenSSL: {_reason(error)}", "get another one")
    if settings.client_ca is not None:
        _certificates("server.tls.client_ca", settings.client_ca)
        try:
            context.load_verify_locations(settings.client_ca)
        except (ssl.SSLError, OSError) as error:
            _refuse("server.tls.client_ca", settings.client_ca, f"is refused by OpenSSL: {_reason(error)}", "get another one")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _certificates(setting: str, path: Path) -> Sequence[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(setting, path))
    except ValueError:
        _refuse(setting, path, "holds no readable PEM certificate", "it must begin with '-----BEGIN CERTIFICATE-----'")


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    setting, now = "server.tls.certificate", datetime.datetime.now(datetime.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        _refuse(setting, path, f"expired on {end:%Y-%m-%d %H:%M} UTC", "renew it and start again")
    if now < begin:
        _refuse(setting, path, f"is not valid before {begin:%Y-%m-%d %H:%M} UTC", "wait, or check this machine's clock")
    if end - now < datetime.timedelta(days=EXPIRY_WARNING_DAYS):
        logger.warning("%s: '%s' expires on %s UTC; renew it and restart", setting, path, f"{end:%Y-%m-%d %H:%M}")


def _private_key(path: Path) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    setting = "server.tls.key"
    try:
        return load_pem_private_key(read_private(path, f"{setting}:"), password=None)
    except TypeError:
        cure = "store it without one, for example with 'openssl pkey -in FILE -out NEW', readable by this user only"
        _refuse(setting, path, "is protected by a password, and nobody is there to type it", cure)
    except (ValueError, UnsupportedAlgorithm):
        _refuse(setting, path, "holds no readable PEM private key", "it must begin with '-----BEGIN PRIVATE KEY-----'")


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _unreadable(setting, path, error)


def _unreadable(setting: str, path: Path, error: OSError) -> NoReturn:
    _refuse(setting, path, f"cannot be read: {error.strerror or error}", "check the path and who may read it")


def _refuse(setting: str, path: Path, cause: str, cure: str) -> NoReturn:
    raise ConfigError(f"{setting}: {str(path)!r} {cause}; {cure}") from None


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)
