"""A whole answer, collected from pipeline events for clients that do not stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import Delta, Done, Event, Started, TokenEntry, Usage


@dataclass(slots=True)
class Choice:
    """One answer to one prompt, so far."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: str = "stop"

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)


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
                choice = choices[event.index]
                choice.texts.append(event.text)
                if event.tokens:
                    choice.tokens += event.tokens
                if event.finish_reason is not None:
                    choice.finish_reason = event.finish_reason
            elif isinstance(event, Started):
                started = event
                exchange.model = event.model
            elif isinstance(event, Done) and started is not None:
                exchange.usage = event.usage
                return Answer(started, choices, event.usage)
    raise RuntimeError("the pipeline ended without Started or Done")
