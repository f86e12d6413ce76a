"""A client that sends exactly the bytes it is told to, over one connection."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response.

    Attributes:
        headers: names in lower case.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object; asserts that it has OpenAI's four keys and nothing else."""
        document = json.loads(self.body)
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = document["error"]
        return error


class RawConnection:
    """A TCP connection to a server; a context manager."""

    def __init__(self, url: str, *, seconds: float = 15.0, receive_buffer: int | None = None) -> None:
        """Connect.

        Args:
            seconds: longest wait for anything.
            receive_buffer: bytes that the system takes for us before it stops the sender; by default many.
        """
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._socket = socket.socket()
        self._socket.settimeout(seconds)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect((parts.hostname, parts.port or 80))
        self._received = b""
        self.opened = time.monotonic()

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Send all of it; False if the server had closed."""
        try:
            self._socket.sendall(data)
        except (ConnectionError, TimeoutError):
            return False
        return True

    def reply(self) -> Reply:
        """The next response; interim ones (1xx) are skipped."""
        while True:
            head, separator, rest = self._received.partition(b"\r\n\r\n")
            if separator and head.startswith(b"HTTP/1.1 100"):
                self._received = rest
            elif separator:
                break
            else:
                assert self._receive(), f"the connection ended after {self._received[:200]!r}"
        self._received = rest
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            return Reply(int(status_line.split()[1]), headers, self._chunks())
        return Reply(int(status_line.split()[1]), headers, self._take(int(headers.get("content-length", "0"))))

    def ended(self) -> bool:
        """Wait for the end of the connection; False if something else came, or nothing in time."""
        try:
            while not self._received:
                if not self._receive():
                    return True
        except TimeoutError:
            return False
        return False

    def age(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self.opened

    def _chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self._received:
                assert self._receive(), "the connection ended within a chunked body"
            size_line, _, self._received = self._received.partition(b"\r\n")
            size = int(size_line, 16)
            body += self._take(size)
            self._take(2)
            if size == 0:
                return body

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            assert self._receive(), "the connection ended within a body"
        data, self._received = self._received[:size], self._received[size:]
        return data

    def _receive(self) -> bool:
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            return False
        self._received += data
        return bool(data)


def head(method: str, target: str, *lines: str, host: str | None = "localhost") -> bytes:
    """The head of a request; `host` None leaves the header out."""
    hosts = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *hosts, *lines, "", ""]).encode("latin-1")


def ask(url: str, data: bytes) -> Reply:
    """Send bytes over a connection of their own and return the response to them."""
    with RawConnection(url) as connection:
        connection.send(data)
        return connection.reply()
