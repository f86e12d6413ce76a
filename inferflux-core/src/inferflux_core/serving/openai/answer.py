"""A whole answer, collected from pipeline events for clients that do not stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import CallDelta, Delta, Done, Event, Started, TokenEntry, Usage


@dataclass(slots=True)
class Call:
    """One call of a tool, so far."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    incomplete: bool = False

    @property
    def arguments(self) -> str:
        """The JSON text of its arguments."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Choice:
    """One answer to one prompt, so far."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: str = "stop"

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """All of its thoughts."""
        return "".join(self.thoughts)

    def take(self, delta: Delta) -> None:
        """Add what is new."""
        self.texts.append(delta.text)
        if delta.reasoning:
            self.thoughts.append(delta.reasoning)
        for piece in delta.calls:
            self._take_call(piece)
        if delta.tokens:
            self.tokens += delta.tokens
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason

    def _take_call(self, piece: CallDelta) -> None:
        if piece.name:
            self.calls.append(Call(piece.id, piece.name))
        call = self.calls[piece.index]
        call.pieces.append(piece.arguments)
        call.incomplete |= piece.incomplete


@dataclass(slots=True)
class Answer:
    """Everything a request brought."""

    started: Started
    choices: list[Choice]
    usage: Usage


async def collect(events: AsyncGenerator[Event, None], num_choices: int, exchange: Exchange) -> Answer:
    """Wait for all events of a request. Cancelling the wait closes the generator.

    Raises:
        RequestError: the pipeline refused or ended the request.
    """
    choices = [Choice() for _ in range(num_choices)]
    started: Started | None = None
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                choices[event.index].take(event)
            elif isinstance(event, Started):
                started = event
                exchange.model = event.model
            elif isinstance(event, Done) and started is not None:
                exchange.usage = event.usage
                return Answer(started, choices, event.usage)
    raise RuntimeError("the pipeline ended without Started or Done")
