"""TLS: real handshakes through `inferflux serve`, and every reason not to start."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from inferflux_core.errors import ConfigError
from inferflux_core.serving.tls import server_context
from inferflux_core.settings import TlsSettings
from served import ServedInferFlux, fake, starting, until
from tls_files import Authority, KeyPair


@dataclass(frozen=True)
class Files:
    """Attributes:
    ca: signed everything else.
    other: another key pair of the same authority.
    """

    folder: Path
    ca: Authority
    server: KeyPair
    other: KeyPair

    def settings(self, **changes: object) -> TlsSettings:
        return TlsSettings.model_validate({"certificate": self.server.certificate, "key": self.server.key, **changes})


@pytest.fixture
def files(tmp_path: Path) -> Files:
    ca = Authority(tmp_path)
    return Files(tmp_path, ca, ca.issue("server"), ca.issue("other"))


def written(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


REFUSED: dict[str, tuple[Callable[[Files], TlsSettings], str, str]] = {
    "no certificate": (lambda f: f.settings(certificate=f.folder / "none.pem"), "none.pem", "cannot be read: No such file"),
    "no key": (lambda f: f.settings(key=f.folder / "none.key"), "none.key", "cannot be read: No such file"),
    "no client CA": (lambda f: f.settings(client_ca=f.folder / "none.ca"), "none.ca", "cannot be read: No such file"),
    "empty certificate": (
        lambda f: f.settings(certificate=written(f.folder / "empty.pem", b"")),
        "empty.pem",
        "holds no readable PEM certificate; it must begin with '-----BEGIN CERTIFICATE-----'",
    ),
    "key as certificate": (lambda f: f.settings(certificate=f.server.key), "server.key", "holds no readable PEM certificate"),
    "certificate as key": (
        lambda f: f.settings(key=written(f.folder / "a.key", f.server.certificate.read_bytes())),
        "a.key",
        "holds no readable PEM private key",
    ),
    "key of another": (lambda f: f.settings(key=f.other.key), "other.key", "is not the key of the first certificate in"),
    "authority before the server": (
        lambda f: f.settings(
            certificate=written(f.folder / "chain.pem", f.ca.certificate.read_bytes() + f.server.certificate.read_bytes())
        ),
        "server.key",
        "put the server's own certificate first in its file",
    ),
    "key for all": (
        lambda f: f.settings(key=written(f.folder / "open.key", f.server.key.read_bytes(), 0o644)),
        "open.key",
        "can be read or written by others (mode 644); run: chmod 600",
    ),
    "key with password": (
        lambda f: f.settings(key=f.ca.issue("locked", password=b"secret").key),
        "locked.key",
        "is protected by a password",
    ),
    "expired": (
        lambda f: TlsSettings(**vars_of(f.ca.issue("old", days=(-2, -0.5)))),
        "old.crt",
        "expired on ",
    ),
    "not yet": (lambda f: TlsSettings(**vars_of(f.ca.issue("new", days=(1, 2)))), "new.crt", "is not valid before "),
    "client CA without certificates": (
        lambda f: f.settings(client_ca=written(f.folder / "ca.txt", b"hello")),
        "ca.txt",
        "holds no readable PEM certificate",
    ),
}


def vars_of(pair: KeyPair) -> dict[str, Path]:
    return {"certificate": pair.certificate, "key": pair.key}


@pytest.mark.parametrize("case", REFUSED)
def test_no_start_with_files_that_cannot_work(case: str, files: Files) -> None:
    make, name, cause = REFUSED[case]
    settings = make(files)
    with pytest.raises(ConfigError) as raised:
        server_context(settings)
    message = str(raised.value)
    assert re.match(rf"server\.tls\.(certificate|key|client_ca): '{re.escape(str(files.folder / name))}' ", message)
    assert cause in message
    assert "; " in message
    assert "secret" not in message


def test_a_certificate_about_to_expire_is_served_with_a_warning(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server_context(files.settings())
        assert caplog.records == []
        server_context(TlsSettings(**vars_of(files.ca.issue("soon", days=(-1, 13)))))
    assert "expires on" in caplog.text


def test_the_server_does_not_start_without_its_key(files: Files) -> None:
    files.server.key.chmod(0o640)
    with starting(*fake(), *arguments(files)) as served:
        assert served.process.wait(30) == 2
        served._reader.join(30)
        assert "can be read or written by others (mode 640); run: chmod 600" in "".join(served.log)
        assert served.url == ""


def arguments(files: Files, *more: str) -> list[str]:
    pairs = [f"certificate={files.server.certificate}", f"key={files.server.key}", *more]
    state = f"state_dir={files.folder / 'state'}"
    return [part for pair in pairs for part in ("--set", f"server.tls.{pair}")] + ["--set", state]


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Files]]:
    """A server that wants client certificates."""
    folder = tmp_path_factory.mktemp("tls")
    ca = Authority(folder)
    files = Files(folder, ca, ca.issue("server"), ca.issue("client"))
    timeout = ("--set", "server.header_timeout_s=0.5")
    with starting(*fake(), *arguments(files, f"client_ca={ca.certificate}"), *timeout) as served:
        yield ready_url(served), files


def ready_url(served: ServedInferFlux) -> str:
    def urls() -> list[str]:
        return re.findall(r"is ready on (\S+)", "".join(served.log))

    until(lambda: bool(urls()) or served.process.poll() is not None)
    assert urls(), "".join(served.log)
    assert urls()[0].startswith("https://127.0.0.1:")
    return urls()[0]


def client_context(files: Files, pair: KeyPair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca.certificate)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def test_https_with_a_client_certificate(mutual: tuple[str, Files]) -> None:
    url, files = mutual
    with httpx.Client(verify=client_context(files, files.other), base_url=url) as client:
        assert client.get("/v1/models").status_code == 200
        answer = client.post("/v1/completions", json={"model": "fake", "prompt": "hi", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert client.get("/v1/models", headers={"origin": url}).status_code == 200
        assert client.get("/v1/models", headers={"origin": url.replace("https", "http")}).status_code == 403


def test_no_request_without_a_certificate_of_the_client_ca(mutual: tuple[str, Files], tmp_path: Path) -> None:
    url, files = mutual
    stranger = Authority(tmp_path, "other-ca").issue("stranger")
    for pair in (None, stranger):
        client = httpx.Client(verify=client_context(files, pair))
        # In TLS 1.3 the client learns of it after its own part of the handshake.
        refusals = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)
        with client, pytest.raises(refusals):
            client.get(url + "/v1/models")


def test_versions(mutual: tuple[str, Files]) -> None:
    url, files = mutual
    for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)):
        context = client_context(files, files.other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is not the client who refuses
            context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=10) as plain:
            if works:
                with context.wrap_socket(plain, server_hostname="localhost") as connection:
                    assert connection.version() == version.name.replace("_", ".")
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(plain, server_hostname="localhost")


def test_min_version(files: Files) -> None:
    assert server_context(files.settings()).minimum_version == ssl.TLSVersion.TLSv1_2
    context = server_context(files.settings(min_version="1.3"))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_NONE


def test_what_is_no_tls_is_cut_off(mutual: tuple[str, Files]) -> None:
    port = httpx.URL(mutual[0]).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/" not in received(plain)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
        assert received(silent) == b""  # no handshake within header_timeout_s


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    try:
        while part := connection.recv(4096):
            data += part
    except ConnectionError:
        pass
    return data
