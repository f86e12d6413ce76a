"""Speculative decoding: whose next tokens are guessed in a step, and how many of them.

A draft is tokens that the model verifies in one step (Leviathan et al., arXiv 2211.17192). Every sampled token is one of the
target's own, drawn with noise that is keyed by its position, so the answer is the same with and without (acceptance by
equality of coupled draws, cf. arXiv 2408.07978). What is decided here is only what a step costs, and by measurement: how
many tokens of such guesses held before, and how long steps of so many tokens take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from inferflux_core.engine.verify_cost import VerifyCost
from inferflux_core.interfaces import KnownSequence, Outlook, Proposer

SequenceT = TypeVar("SequenceT", bound=KnownSequence)

# What a draft is expected to bring counts for so much: predictions are not exact, and small wins are noise.
_TRUST = 0.9
_PRIOR_WEIGHT = 8.0  # tokens of experience that an expectation counts for
_MOST_OWN, _MOST_OF_KIND = 30.0, 300.0  # tokens of experience after which older ones are forgotten
# A kind of guess that did not pay is tried again after a while: at each refusal what speaks against it fades a little.
_FADE = 0.998


@dataclass(slots=True)
class _Experience:
    """How many tokens of drafts were looked at, up to the first that did not hold, and how many held."""

    looked_at: float = 0.0
    held: float = 0.0

    def add(self, looked_at: int, held: int, most: float) -> None:
        keep = min(1.0, most / max(1.0, self.looked_at + looked_at))
        self.looked_at = self.looked_at * keep + looked_at
        self.held = self.held * keep + held

    def fade(self) -> None:
        self.looked_at *= _FADE
        self.held *= _FADE

    def share(self, expected: float) -> float:
        """Share of tokens that hold, between what was expected and what was seen."""
        return (self.held + _PRIOR_WEIGHT * expected) / (self.looked_at + _PRIOR_WEIGHT)


@dataclass(slots=True)
class SpeculationCounters:
    """What `EngineStats` tells of speculation, field by field as there."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    draft_tokens_per_pos: list[int] = field(default_factory=list)
    accepted_tokens_per_pos: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0

    def add(self, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        for counts, number in ((self.draft_tokens_per_pos, drafted), (self.accepted_tokens_per_pos, accepted)):
            counts += [0] * (drafted - len(counts))
            for position in range(number):
                counts[position] += 1


@dataclass(slots=True)
class _Hope:
    """What might be gained with one sequence."""

    candidate: int  # its index
    kind: int
    share: float  # of its tokens that are expected to hold
    most: int


class Speculation:
    """Asks one proposer for drafts where they pay. Engine thread only."""

    def __init__(self, proposer: Proposer, cost: VerifyCost, max_draft: int) -> None:
        """
        Args:
            cost: of steps, by their number of tokens.
            max_draft: most tokens of one draft.
        """
        self.counters = SpeculationCounters()
        self._proposer = proposer
        self._cost = cost
        self._max_draft = max_draft
        self._kinds = [_Experience() for _ in range(proposer.num_kinds)]
        self._own: dict[str, dict[int, _Experience]] = {}
        # Kind and length of the drafts of the step that is being planned or computed.
        self._drafted: dict[str, tuple[int, int]] = {}
        self._ms_per_token = 0.0  # that proposing takes

    def draft(
        self, candidates: Sequence[tuple[SequenceT, int]], num_decodes: int, room: int
    ) -> list[tuple[SequenceT, list[int]]]:
        """Drafts for the decodes of a step, of sequences for which they pay.

        Args:
            candidates: sequences with the most tokens that each may be given.
            num_decodes: sequences that decode in the step, candidates among them.
            room: tokens that the step has left for drafts.
        """
        began = time.perf_counter()
        self._drafted.clear()
        hopes = self._hopes(candidates)
        chosen = list(self._choose(hopes, num_decodes, room))
        for hope, length in zip(hopes, chosen, strict=True):
            if not length:
                self._kinds[hope.kind].fade()
        wanted = [
            (candidates[hope.candidate][0], length, hope.kind) for hope, length in zip(hopes, chosen, strict=True) if length
        ]
        drafts: list[tuple[SequenceT, list[int]]] = []
        if wanted:
            proposing = time.perf_counter()
            proposed = self._proposer.propose([(sequence, length) for sequence, length, _ in wanted])
            for (sequence, length, kind), tokens in zip(wanted, proposed, strict=True):
                if tokens:
                    drafts.append((sequence, list(tokens[:length])))
                    self._drafted[sequence.request_id] = kind, len(drafts[-1][1])
            # Otherwise the proposer was busy with what it has to do once, such as to read a prompt.
            if len(drafts) == len(wanted) and all(sequence.request_id in self._own for sequence, _, _ in wanted):
                taken = (time.perf_counter() - proposing) * 1e3 / sum(len(draft) for _, draft in drafts)
                self._ms_per_token += (taken - self._ms_per_token) * (0.1 if self._ms_per_token else 1.0)
        elif hopes:  # or one proposal that was disturbed would be the last
            self._ms_per_token *= _FADE
        self.counters.draft_seconds += time.perf_counter() - began
        return drafts

    def would_draft(self, candidates: Sequence[tuple[KnownSequence, int]], num_decodes: int, room: int) -> bool:
        """Whether `draft` would ask for any; asks for none."""
        return any(self._choose(self._hopes(candidates), num_decodes, room))

    def _hopes(self, candidates: Sequence[tuple[KnownSequence, int]]) -> list[_Hope]:
        """The likeliest first."""
        hopes = []
        for i, (sequence, most) in enumerate(candidates):
            outlook = self._proposer.outlook(sequence)
            if outlook is not None:
                share = self._share(sequence.request_id, outlook)
                hopes.append(_Hope(i, outlook.kind, share, min(most, self._max_draft, outlook.max_tokens)))
        hopes.sort(key=lambda hope: -hope.share)
        return hopes

    def _share(self, request_id: str, outlook: Outlook) -> float:
        of_all = self._kinds[outlook.kind].share(self._proposer.prior(outlook.kind))
        own = self._own.get(request_id, {}).get(outlook.kind)
        return of_all if own is None else own.share(of_all)

    def _choose(self, hopes: Sequence[_Hope], num_decodes: int, room: int) -> Iterator[int]:
        """For each hope the length that raises the step's expected output by the millisecond most; 0 if none does."""
        tokens, output, drafting = num_decodes, float(num_decodes), 0.0
        for hope in hopes:
            best = output / (self._cost.predict(tokens) + drafting)
            chosen, gained = 0, 0.0
            for length in _lengths(min(hope.most, room)):
                gain = _TRUST * _expected(hope.share, length)
                cost = self._cost.predict(tokens + length) + drafting + self._ms_per_token * length
                if (output + gain) / cost > best:
                    best, chosen, gained = (output + gain) / cost, length, gain
            yield chosen
            tokens += chosen
            room -= chosen
            output += gained
            drafting += self._ms_per_token * chosen

    def verified(self, request_id: str, drafted: int, accepted: int) -> None:
        """So many tokens of a sequence's draft held; drafts that this object did not make are ignored.

        Args:
            drafted: tokens that were verified: fewer than were proposed where a constraint forbids the next one, which then
                did not hold either.
        """
        kind, proposed = self._drafted.pop(request_id, (None, 0))
        if kind is None:
            return
        looked_at = min(proposed, accepted + 1)
        self._kinds[kind].add(looked_at, accepted, _MOST_OF_KIND)
        self._own.setdefault(request_id, {}).setdefault(kind, _Experience()).add(looked_at, accepted, _MOST_OWN)
        if drafted:
            self.counters.add(drafted, accepted)

    def observe(self, num_tokens: int, milliseconds: float) -> None:
        """A step of so many decodes and drafts, and nothing else, took so long."""
        self._cost.observe(num_tokens, milliseconds)

    def forget(self, request_id: str) -> None:
        """The sequence ended."""
        self._own.pop(request_id, None)
        self._drafted.pop(request_id, None)
        self._proposer.forget(request_id)

    def close(self) -> None:
        """Close the proposer."""
        self._proposer.close()


def _expected(share: float, length: int) -> float:
    """Tokens of a draft that hold, when each does so with this probability if all before it do."""
    if share >= 1.0:
        return float(length)
    return share * (1.0 - share**length) / (1.0 - share)


def _lengths(most: int) -> Iterator[int]:
    """Lengths to consider: steps that grow, and the longest."""
    length = 1
    while length < most:
        yield length
        length += max(1, length // 2)
    if most >= 1:
        yield most
