"""Which tokens the decodes of a step carry along to be verified: those that must come, and those that are likely to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from inferflux_core.engine.request import Request
from inferflux_core.engine.speculation import Speculation, SpeculationCounters

_NONE = SpeculationCounters()


class Drafting:
    """Sets `Request.draft` of decodes.

    Attributes:
        forced_tokens: drafted so far because a constraint left no choice about them.
    """

    def __init__(self, max_draft: int, max_tokens: int, speculation: Speculation | None) -> None:
        """
        Args:
            max_draft: most tokens of one draft; 0 for no drafts at all.
            max_tokens: most tokens of a step.
            speculation: who guesses; None: only what a constraint leaves no choice about is drafted.
        """
        self.forced_tokens = 0
        self._max_draft = max_draft
        self._max_tokens = max_tokens
        self._speculation = speculation if max_draft else None

    @property
    def counters(self) -> SpeculationCounters:
        """Of the speculation."""
        return _NONE if self._speculation is None else self._speculation.counters

    def draft(self, decodes: Sequence[Request]) -> None:
        """Draft for those that are likely to be faster with it; the step has room for all that is drafted."""
        for request in decodes:
            request.draft = []
        room = self._max_tokens - len(decodes)
        if not self._max_draft or room <= 0:
            return
        open_ended = []
        for request, most in self._candidates(decodes):
            # A forced token holds for certain, and verifying it costs no more than decoding it in a step of its own.
            if request.constraint is not None:
                request.draft = request.constraint.forced(min(most, room))
            room -= len(request.draft)
            self.forced_tokens += len(request.draft)
            if not request.draft:
                open_ended.append((request, most))
        if self._speculation is None or not open_ended or room <= 0:
            return
        for request, draft in self._speculation.draft(open_ended, self._max_tokens - room, room):
            constraint = request.constraint
            request.draft = draft if constraint is None else draft[: constraint.allowed(draft)]
            if not request.draft:  # nothing is left to be verified, and that is the verdict
                self.verified(request, 0, 0)

    def would_draft(self, running: Collection[Request]) -> bool:
        """Whether speculation would pay if the tokens known now were the last ones of these sequences."""
        if self._speculation is None:
            return False
        candidates = [(request, most) for request in running if (most := self._most(request)) > 0]
        return bool(candidates) and self._speculation.would_draft(candidates, len(running), self._max_tokens - len(running))

    def _candidates(self, decodes: Iterable[Request]) -> list[tuple[Request, int]]:
        """Those whose last token is known, and the most that may be drafted for each."""
        return [(r, most) for r in decodes if not r.num_in_flight and (most := self._most(r)) > 0]

    def _most(self, request: Request) -> int:
        if request.params.is_penalised:  # each draw would need the counts of those before it
            return 0
        # The last token of a draft is followed by one more that is sampled.
        most = min(self._max_draft, request.params.max_tokens - request.num_output_tokens - 1)
        return most if request.num_speculative_tokens is None else min(most, request.num_speculative_tokens)

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        """So many tokens of the request's draft held."""
        if self._speculation is not None:
            self._speculation.verified(request.request_id, drafted, accepted)

    def observe(self, num_tokens: int, milliseconds: float) -> None:
        """A step of nothing but so many decodes and drafts took so long."""
        if self._speculation is not None:
            self._speculation.observe(num_tokens, milliseconds)

    def forget(self, request: Request) -> None:
        """The request ended."""
        if self._speculation is not None:
            self._speculation.forget(request.request_id)
