"""Constraints without a grammar: a fixed set of tokens. What masks do to an engine, without a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from inferflux_core.engine.types import Constraint, ConstraintState, GrammarMask, SchedulerOutput


def only(token_ids: Iterable[int]) -> Constraint:
    """Nothing but these tokens may be drawn."""
    return Constraint(grammar=json.dumps(sorted(token_ids)))


class _TokenSet(ConstraintState):
    is_finished = False
    error = None

    def __init__(self, token_ids: frozenset[int]) -> None:
        self.token_ids = token_ids

    def forced(self, at_most: int) -> list[int]:
        return list(self.token_ids) * at_most if len(self.token_ids) == 1 else []

    def allowed(self, draft: Sequence[int]) -> int:
        return next((i for i, token in enumerate(draft) if token not in self.token_ids), len(draft))

    def advance(self, tokens: Sequence[int]) -> None:
        assert self.token_ids.issuperset(tokens), f"{tokens} were drawn, and only {sorted(self.token_ids)} may be"


@dataclass(frozen=True, slots=True)
class _Ready:
    mask: GrammarMask

    def result(self) -> GrammarMask:
        return self.mask


class TokenSets:
    """Understands what `only` makes, in place of grammars."""

    def __init__(self, vocab_size: int) -> None:
        self._words = (vocab_size + 31) // 32

    def compile(self, salt: str, constraint: Constraint) -> Future[ConstraintState]:
        future: Future[ConstraintState] = Future()
        future.set_result(_TokenSet(frozenset(json.loads(constraint.grammar))))
        return future

    def begin(self, plan: SchedulerOutput) -> _Ready | None:
        first: dict[int, int] = {}
        rows: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
        for row in plan.rows:
            state = plan.constraints.get(row.slot)
            if isinstance(state, _TokenSet):
                first[row.slot] = len(rows)
                bits = np.zeros(self._words * 32, dtype=np.uint8)
                bits[list(state.token_ids)] = 1
                rows += [np.packbits(bits, bitorder="little").view(np.int32)] * (row.n_draft + 1)
        return _Ready(GrammarMask(np.stack(rows), first)) if rows else None

    def close(self) -> None:
        """Nothing is held."""
