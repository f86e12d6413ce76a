"""Work for a client that may leave before it is done, streamed or not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client went away before its answer was complete. Nobody is left to tell; it ends as status 499 in the log."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` until it is done or the client goes away.

    uvicorn does not cancel a request when its client leaves; it only says so through `receive()`. So one task watches
    that while another works. Cancelling the work throws `CancelledError` into whatever it waits for, which is how a
    pending event of the pipeline is given up at once.

    Args:
        receive: the ASGI callable, after the request's body was read.

    Returns:
        What `work` returned.

    Raises:
        ClientDisconnected: the client left; the work was cancelled and has cleaned up.
        Exception: whatever `work` raised.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        await cancel_and_wait(task, watcher)


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; what they raise is dropped."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.gather(*pending, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
