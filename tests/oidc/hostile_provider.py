"""An identity provider on loopback that does what it is told, also what no provider should do."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from joserfc.jwk import Key

from oidc.tokens import ec_key, ed_key, key_set, rsa_key

DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/jwks"
INTROSPECTION = "/introspect"

Reply = Callable[[BaseHTTPRequestHandler], None]


class HostileProvider:
    """A provider whose replies can be changed at any time.

    Attributes:
        url: its issuer.
        requests: what was asked of it: method, path, headers and form.
        answers: what introspection says of a token; all others are inactive.
        sent: bytes of endless replies that went out.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, str, dict[str, str], dict[str, str]]] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.sent = 0
        self.released = threading.Event()  # set at the end, so that nobody hangs for ever
        self.replies: dict[str, Reply] = {}
        self.publish(rsa_key(), ec_key(), ed_key())
        self.replies[DISCOVERY] = self.json(self.metadata())
        self.replies[INTROSPECTION] = self._introspect

    def metadata(self, **changes: object) -> dict[str, object]:
        found = {"issuer": self.url, "jwks_uri": self.url + JWKS, "introspection_endpoint": self.url + INTROSPECTION}
        return {**found, **changes}

    def publish(self, *keys: Key, cache_control: str | None = None) -> None:
        """Serve these keys from now on."""
        self.replies[JWKS] = self.json(key_set(*keys), cache_control=cache_control)

    def fetches(self, path: str = JWKS) -> int:
        """How often a path was asked for."""
        return sum(asked == path for _, asked, _, _ in self.requests)

    # --- replies ------------------------------------------------------------------------------------------------------

    def json(self, document: object, *, cache_control: str | None = None) -> Reply:
        headers = {} if cache_control is None else {"Cache-Control": cache_control}
        return self.body(json.dumps(document).encode(), headers=headers)

    def body(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
        def reply(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return reply

    def silence(self, handler: BaseHTTPRequestHandler) -> None:
        """No reply until the end of the test."""
        self.released.wait(30)

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """A byte now and then, so that no single read takes long."""
        handler.send_response(200)
        handler.end_headers()
        while not self.released.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def flood(self, handler: BaseHTTPRequestHandler) -> None:
        """100 MiB, unless the client hangs up before."""
        handler.send_response(200)
        handler.end_headers()
        block = b" " * 65536
        for _ in range(1600):
            handler.wfile.write(block)
            self.sent += len(block)

    def _introspect(self, handler: BaseHTTPRequestHandler) -> None:
        form = self.requests[-1][3]
        self.json(self.answers.get(form.get("token", ""), {"active": False}))(handler)


@contextmanager
def hostile_provider(tls: ssl.SSLContext | None = None) -> Iterator[HostileProvider]:
    """Run one on a free port of loopback; with `tls` over https."""
    provider: HostileProvider

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            form = {name: values[0] for name, values in parse_qs(self.rfile.read(length).decode()).items()}
            provider.requests.append((self.command, self.path, dict(self.headers), form))
            reply = provider.replies.get(self.path, provider.body(b"{}", status=404))
            with suppress(OSError):  # the client hung up
                reply(self)

        do_GET = do_POST = _handle  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that closing waits for them
    scheme = "http" if tls is None else "https"
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a refused handshake is what is tested
    provider = HostileProvider(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield provider
    finally:
        provider.released.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
