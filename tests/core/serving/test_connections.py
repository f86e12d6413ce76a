"""How many connections there may be, in all and of one client."""

from __future__ import annotations

import asyncio

from attacks.raw_http import RawConnection
from core.serving.edge import GET, ask, edge, until
from inferflux_core.serving.connections import MAX_LINGERING_REFUSALS, Connections
from inferflux_core.settings import ServerSettings


async def test_caps_of_connections() -> None:
    async with edge(max_connections=3, max_connections_per_client=2, idle_timeout_s=30) as e:
        port = int(e.url.rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await until(lambda: len(e.registry) == 2)
        reply, ended = await ask(e, GET)
        assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "rate_limit_error", "too_many_connections")
        assert (reply.headers["retry-after"], ended) == ("1", True)
        assert e.registry.admit("192.0.2.1") is None
        refusal = e.registry.admit("192.0.2.2")
        assert refusal is not None
        assert refusal.status == 503
        e.registry.release("192.0.2.1")
        held[0][1].close()
        await held[0][1].wait_closed()
        await until(lambda: len(e.registry) == 1)

        def play(connection: RawConnection) -> int:
            connection.send(GET)
            return connection.reply().status

        assert await e.talk(play) == 200
        held[1][1].close()
        await held[1][1].wait_closed()


def test_who_counts_as_one_client() -> None:
    settings = ServerSettings(max_connections_per_client=1, trusted_proxies=("10.0.0.0/8",))
    registry = Connections(settings, lambda status, code: None)
    assert registry.admit("2001:db8::1") is None
    assert registry.admit("2001:db8::2") is not None  # one subscriber has the whole /64
    assert registry.admit("2001:db8:0:1::1") is None
    assert registry.admit("192.0.2.1") is None
    assert registry.admit("::ffff:192.0.2.1") is not None
    assert registry.admit("10.1.2.3") is None
    assert registry.admit("10.1.2.3") is None  # a proxy brings many clients
    assert len(registry) == 5
    assert [registry.linger() for _ in range(MAX_LINGERING_REFUSALS + 1)] == [True] * MAX_LINGERING_REFUSALS + [False]
    registry.linger_done()
    assert registry.linger()
