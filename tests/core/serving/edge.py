"""A listening server with the protocol of the edge and a small application that tells what it saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from attacks.raw_http import RawConnection, Reply, head
from inferflux_core.serving.connections import Connections
from inferflux_core.serving.protocol import EdgeProtocol, edge_protocol
from inferflux_core.settings import ServerSettings

FAST = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "idle_timeout_s": 0.3, "slow_reader_timeout_s": 0.3}
GET = head("GET", "/")


@dataclass
class Edge:
    """A listening server with an application that tells what it saw.

    Attributes:
        seen: path and body of each request that was read to its end; None for the body of one whose client left.
        refusals: status and code of what was refused before the application.
        gate: the application answers `/slow` only when it is set.
    """

    registry: Connections
    url: str = ""
    seen: list[tuple[str, bytes | None]] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    state: ServerState = field(default_factory=ServerState)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["path"] == "/early":
            await self._answer(send, b"early")
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.append((scope["path"], None))
                return
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/slow":
            gate, left = asyncio.create_task(self.gate.wait()), asyncio.create_task(receive())
            await asyncio.wait((gate, left), return_when=asyncio.FIRST_COMPLETED)
            gone = left.done()
            for task in (gate, left):
                task.cancel()
            if gone:
                self.seen.append((scope["path"], None))
                return
        self.seen.append((scope["path"], body))
        await self._answer(send, b"x" * 8_000_000 if scope["path"] == "/large" else scope["path"].encode())

    async def _answer(self, send: Send, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    @property
    def protocol(self) -> EdgeProtocol:
        """Of the one connection there is."""
        (protocol,) = self.state.connections
        assert isinstance(protocol, EdgeProtocol)
        return protocol

    async def talk(self, play: Callable[[RawConnection], Any]) -> Any:
        """Run a blocking conversation on a connection of its own."""

        def run() -> Any:
            with RawConnection(self.url, seconds=10) as connection:
                return play(connection)

        return await asyncio.to_thread(run)


@contextlib.asynccontextmanager
async def edge(**settings: Any) -> AsyncIterator[Edge]:
    refusals: list[tuple[int, str]] = []
    registry = Connections(ServerSettings(**{**FAST, **settings}), lambda status, code: refusals.append((status, code)))
    e = Edge(registry, refusals=refusals)
    config = uvicorn.Config(
        e.app, http=edge_protocol(registry), interface="asgi3", ws="none", lifespan="off", log_config=None, proxy_headers=False
    )
    config.load()
    loop = asyncio.get_running_loop()
    make: Any = config.http_protocol_class
    server = await loop.create_server(
        lambda: make(config=config, server_state=e.state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    e.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield e
    finally:
        server.close()
        for connection in list(e.state.connections):
            assert isinstance(connection, EdgeProtocol)
            connection.transport.abort()
        await until(lambda: not e.state.connections and not e.state.tasks)
        assert len(registry) == 0
        await server.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what it waits for is the state of sockets
            await asyncio.sleep(0.005)


async def ask(e: Edge, data: bytes) -> tuple[Reply, bool]:
    """The reply, and whether the connection ended after it."""

    def play(connection: RawConnection) -> tuple[Reply, bool]:
        connection.send(data)
        return connection.reply(), connection.ended()

    return await e.talk(play)


def post(path: str, length: int, *lines: str) -> bytes:
    return head("POST", path, f"Content-Length: {length}", *lines)
