"""Drafts by looking up what followed the same tokens before: prompt lookup (Saxena 2023; Yang et al., arXiv 2304.04487).

Answers that quote, edit or summarise their prompt repeat it word for word, and code repeats itself. The index grows with the
sequence and costs O(1) a token: the last n tokens, packed into one integer, lead to the place after their last occurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from inferflux_core.interfaces import KnownSequence, Outlook, Proposer
from inferflux_core.settings import Group

_TOKEN_BITS = 24
# The longer the tokens before agree, the likelier those after do: agreement from so many tokens on is a kind of guess of its
# own, with this share of tokens expected to hold until it has been measured.
_KINDS = ((1, 0.4), (5, 0.6), (8, 0.8), (16, 0.92), (32, 0.96))
_MAX_AGREEMENT = _KINDS[-1][0]


class NgramSettings(Group):
    """When a place counts as the same."""

    prompt_lookup_min: int = Field(
        3, ge=1, le=16, description="Tokens that have to agree before what follows them is proposed; vLLM's name."
    )


@dataclass(slots=True)
class _Index:
    """What is known of one sequence.

    Attributes:
        places: last n tokens -> position after their last occurrence.
        size: tokens that were looked at.
        key: the last n of them, packed.
        source: position from which on to copy; None when nothing agrees.
        agreement: tokens before `source` that equal those at the end of the sequence, as far as counted.
    """

    places: dict[int, int] = field(default_factory=dict)
    size: int = 0
    key: int = 0
    source: int | None = None
    agreement: int = 0


class NgramProposer(Proposer):
    """Copies what followed the last occurrence of the last tokens, and goes on copying where that agreed."""

    num_kinds = len(_KINDS)

    def __init__(self, settings: NgramSettings) -> None:
        self._n = settings.prompt_lookup_min
        self._mask = (1 << (_TOKEN_BITS * self._n)) - 1
        self._indices: dict[str, _Index] = {}

    def prior(self, kind: int) -> float:
        return _KINDS[kind][1]

    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        index = self._indices.get(sequence.request_id)
        if index is None:
            index = self._indices[sequence.request_id] = _Index()
        if index.size < len(sequence.tokens):
            self._grow(index, sequence.tokens)
        if index.source is None:
            return None
        # What is copied goes on into the draft itself, so a text that repeats itself can be continued without end.
        kind = max(i for i, (least, _) in enumerate(_KINDS) if index.agreement >= least)
        return Outlook(max_tokens=len(sequence.tokens), kind=kind)

    def _grow(self, index: _Index, tokens: Sequence[int]) -> None:
        n, mask, places = self._n, self._mask, index.places
        key, source, agreement = index.key, index.source, index.agreement
        for i in range(index.size, len(tokens)):
            token = tokens[i]
            key = ((key << _TOKEN_BITS) | token) & mask
            if source is not None and tokens[source] == token:
                source += 1
                agreement += 1
            else:
                source = None
            if i + 1 >= n:
                if source is None and (source := places.get(key)) is not None:
                    agreement = self._agreement(tokens, source, i + 1)
                places[key] = i + 1
        index.size, index.key, index.source, index.agreement = len(tokens), key, source, agreement

    def _agreement(self, tokens: Sequence[int], source: int, end: int) -> int:
        """How many tokens before two positions are equal; at least n of them are."""
        most = min(_MAX_AGREEMENT, source)
        agreement = self._n
        while agreement < most and tokens[source - 1 - agreement] == tokens[end - 1 - agreement]:
            agreement += 1
        return agreement

    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        return [self._copy(sequence, count) for sequence, count in wanted]

    def _copy(self, sequence: KnownSequence, count: int) -> list[int]:
        source = self._indices[sequence.request_id].source
        if source is None:
            return []
        draft = list(sequence.tokens[source : source + count])
        period = len(sequence.tokens) - source
        while len(draft) < count:
            draft.append(draft[len(draft) - period])
        return draft

    def forget(self, request_id: str) -> None:
        self._indices.pop(request_id, None)
