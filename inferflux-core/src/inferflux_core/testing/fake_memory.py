"""The fake backend's cache: cells with states, and a guard that knows which of them the steps in flight use."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inferflux_core.engine.types import PagedOps, Row, SchedulerOutput, SequenceOps
from inferflux_core.testing.fake_settings import FakeSettings


@dataclass(slots=True)
class FakeMemory:
    """States by cell. Paged: a table of blocks for each slot. Sequence: a list for each stream."""

    settings: FakeSettings
    mix: Callable[[int, int], int]
    blocks: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    streams: dict[int, list[int]] = field(default_factory=dict)

    def apply(self, row: Row) -> None:
        """Carry out the row's cache operations."""
        match row.kv:
            case PagedOps(new_blocks):
                self.tables.setdefault(row.slot, []).extend(new_blocks)
            case SequenceOps(stream, copy_from, keep_len, clear):
                for other in clear:
                    self.streams.pop(other, None)
                if copy_from is not None:
                    self.streams[stream] = list(self.streams[copy_from])
                if keep_len is not None:
                    cells = self.streams.setdefault(stream, [])
                    assert self.settings.can_trim or keep_len in (0, len(cells)), "a stream that cannot be trimmed was cut"
                    del cells[keep_len:]

    def compute(self, row: Row, tokens: Sequence[int]) -> list[int]:
        """Write the cells of these tokens; the states of the last one and of those that are verified with it."""
        if isinstance(row.kv, SequenceOps):
            states = self._compute_stream(row, tokens, self.streams[row.kv.stream])
        else:
            states = self._compute_blocks(row, tokens)
        return states[-1 - row.n_draft :]

    def _compute_stream(self, row: Row, tokens: Sequence[int], cells: list[int]) -> list[int]:
        assert len(cells) == row.start, f"row starts at {row.start}, the stream holds {len(cells)}"
        state = cells[-1] if cells else 1
        for token in tokens:
            state = self.mix(state, token)
            cells.append(state)
        limit = self.settings.pool_tokens
        assert limit is None or sum(map(len, self.streams.values())) <= limit, "the shared pool overflowed"
        return cells[row.start :]

    def _compute_blocks(self, row: Row, tokens: Sequence[int]) -> list[int]:
        size = self.settings.block_size
        table = self.tables[row.slot]
        state = 1
        if row.start:
            state = self.blocks[table[(row.start - 1) // size]][(row.start - 1) % size]
        states = []
        for position, token in enumerate(tokens, row.start):
            state = self.mix(state, token)
            self.blocks.setdefault(table[position // size], [0] * size)[position % size] = state
            states.append(state)
        return states


@dataclass(slots=True, frozen=True)
class _Use:
    """What one row touches: block ids, or stream ids.

    Attributes:
        cells: what it reads or writes.
        writes: what it changes; also the streams that it clears first, which rows after it in the same step may use.
    """

    sequence: int
    slot: int
    cells: frozenset[int]
    writes: frozenset[int]


class FlightGuard:
    """Raises when a step is launched that changes what another sequence's row in flight uses, or uses what it changes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._numbers = itertools.count()
        self._sequences: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self._in_flight: deque[list[_Use]] = deque()

    def launch(self, plan: SchedulerOutput) -> None:
        """The plan is in flight from now on.

        Raises:
            AssertionError: a slot was freed, or a block or stream given to another sequence, while a step in flight uses it.
        """
        in_flight = [use for uses in self._in_flight for use in uses]
        slots = {use.slot for use in in_flight}
        for slot in [*plan.free, *(init.slot for init in plan.start)]:
            assert slot not in slots, f"slot {slot} was freed while a step in flight uses it"
        for init in plan.start:
            self._sequences[init.slot] = next(self._numbers)
            self._tables[init.slot] = []
        uses = [self._use(row) for row in plan.rows]
        users: dict[int, list[_Use]] = {}
        for theirs in in_flight:
            for cell in theirs.cells:
                users.setdefault(cell, []).append(theirs)
        for ours in uses:
            for cell in ours.cells | ours.writes:
                for theirs in users.get(cell, ()):
                    changes = cell in ours.writes or cell in theirs.writes
                    assert ours.sequence == theirs.sequence or not changes, (
                        f"slots {ours.slot} and {theirs.slot} both use {cell}, which one of them writes, in steps in flight"
                    )
        self._in_flight.append(uses)

    def collect(self) -> None:
        """The oldest plan in flight is done."""
        self._in_flight.popleft()

    def _use(self, row: Row) -> _Use:
        match row.kv:
            case PagedOps(new_blocks):
                table = self._tables[row.slot]
                table.extend(new_blocks)
                first, last = row.start // self._block_size, (row.start + row.n - 1) // self._block_size
                cells, writes = frozenset(table[: last + 1]), frozenset(table[first : last + 1])
            case SequenceOps(stream, _, _, clear):  # a donor may run on while it is copied
                cells, writes = frozenset([stream]), frozenset([stream, *clear])
        return _Use(self._sequences[row.slot], row.slot, cells, writes)
