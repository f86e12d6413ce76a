"""What the engine asks of whoever holds its sequences to their constraints: `Grammars`, or a stand-in in tests."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from inferflux_core.engine.types import Constraint, ConstraintState, GrammarMask, SchedulerOutput


class PendingMask(Protocol):
    """The mask of one step, on its way."""

    def result(self) -> GrammarMask | None:
        """Wait for it; None if no row of the step is constrained after all. Never raises."""


class Constraints(Protocol):
    """Compiles constraints and makes the masks of steps. Engine thread only."""

    def compile(self, salt: str, constraint: Constraint) -> Future[ConstraintState]:
        """The state of a new sequence, soon. One that cannot be held has `error` set; the future never fails.

        Args:
            salt: what was compiled for one salt is found by the same salt only, not even by the time it takes.
        """

    def begin(self, plan: SchedulerOutput) -> PendingMask | None:
        """Begin the mask of a plan whose sequences have taken in all tokens drawn so far; None if nobody is constrained."""

    def close(self) -> None:
        """End threads, and forget what was compiled."""
