"""Server-sent events as chat servers send them, decoded from bytes that may be split anywhere."""

from __future__ import annotations

MAX_LINE_BYTES = 16 * 1024 * 1024  # one line past this is no token stream: stop before memory goes

DONE = b"[DONE]"
"""The payload that ends an OpenAI stream."""


class EventStreamError(ValueError):
    """The bytes cannot be an event stream (a line longer than MAX_LINE_BYTES)."""


class EventStream:
    """Turns the bytes of one `text/event-stream` body into the payloads of its events.

    Only `data` is read: comments (`: ping`) and the fields `event`, `id`, `retry` are skipped. Lines may end in LF or
    CRLF; several `data` lines of one event are joined by LF, as the standard says. An event counts once its empty line
    has arrived, so a body that is cut off never yields half an event.
    """

    __slots__ = ("_data", "_tail")

    def __init__(self) -> None:
        self._tail = b""  # the line whose end has not arrived yet
        self._data: list[bytes] = []  # the data lines of the event whose empty line has not arrived yet

    def feed(self, received: bytes) -> list[bytes]:
        """Takes the next bytes and returns the payloads that they complete, in order.

        Raises:
            EventStreamError: a line has grown past MAX_LINE_BYTES.
        """
        lines = received.split(b"\n")
        if self._tail:
            lines[0] = self._tail + lines[0]
        self._tail = lines.pop()
        if len(self._tail) > MAX_LINE_BYTES:
            raise EventStreamError(f"a line of the event stream is longer than {MAX_LINE_BYTES} bytes")
        events: list[bytes] = []
        for line in lines:
            if line[:5] == b"data:":
                # One space after the colon belongs to the syntax, a CR to the line end; JSON needs neither.
                value = line[6:] if line[5:6] == b" " else line[5:]
                self._data.append(value.removesuffix(b"\r"))
            elif (not line or line == b"\r") and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events
