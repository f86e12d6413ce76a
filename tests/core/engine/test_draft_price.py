"""What proposing costs is measured where it is only that: reading a prompt, which is done once, is no price of a guess."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inferflux_core.engine import speculation
from inferflux_core.engine.request import Request
from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.verify_cost import VerifyCost
from inferflux_core.interfaces import KnownSequence, Outlook, Proposer
from inferflux_core.testing.driver import make_request


class Clock:
    """Seconds that pass only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Reader(Proposer):
    """Takes a second to read a sequence that it does not know, and then a millisecond a token."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: set[str] = set()

    def prior(self, kind: int) -> float:
        return 0.9

    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        return Outlook(100)

    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        for sequence, count in wanted:
            if sequence.request_id not in self._known:
                self._clock.now += 1.0
                self._known.add(sequence.request_id)
            self._clock.now += 1e-3 * count
        return [[7] * count for _, count in wanted]

    def forget(self, request_id: str) -> None:
        self._known.discard(request_id)


def test_reading_a_sequence_does_not_make_its_drafts_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(speculation, "time", clock)
    subject = Speculation(Reader(clock), VerifyCost((1, 64), (40.0, 80.0)), max_draft=8)
    for name in ("a", "b"):
        sequence = Request.of(make_request([1, 2, 3], request_id=name))
        for _ in range(5):
            ((_, draft),) = subject.draft([(sequence, 100)], 1, 100)
            assert len(draft) == 8
            subject.verified(name, 8, 8)
    assert subject.counters.drafts == 10
    assert subject.counters.draft_seconds == pytest.approx(2.0 + 10 * 8e-3)


def test_a_slow_proposer_is_still_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(speculation, "time", clock)
    subject = Speculation(Reader(clock), VerifyCost((1, 64), (0.1, 0.2)), max_draft=8)  # a step in a tenth of a guess's time
    sequence = Request.of(make_request([1, 2, 3], request_id="a"))
    for expected in (True, True, False, False):
        assert bool(subject.draft([(sequence, 100)], 1, 100)) is expected
        subject.verified("a", 8, 8)
