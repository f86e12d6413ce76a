"""Who is given drafts, and how many: what was accepted before, against what steps cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from inferflux_core.engine.request import Request
from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.verify_cost import VerifyCost
from inferflux_core.interfaces import EngineConfig, KnownSequence, Outlook, Proposer
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings
from inferflux_core.testing.scripted_drafts import ScriptedDrafts

CHEAP = VerifyCost((1, 64), (10.0, 20.0))  # a token more costs a sixtieth of the first
DEAR = VerifyCost((1, 64), (10.0, 640.0))  # a token more costs as much as the first


class Guesses(Proposer):
    """Proposes the token 7, of a kind chosen for each sequence; None has no outlook."""

    num_kinds = 3

    def __init__(self, kinds: Mapping[str, int | None] | None = None, most: int = 32) -> None:
        self.kinds = kinds or {}
        self.most = most
        self.forgotten: list[str] = []
        self.closed = False

    def prior(self, kind: int) -> float:
        return (0.2, 0.6, 0.95)[kind]

    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        kind = self.kinds.get(sequence.request_id, 1)
        return None if kind is None else Outlook(self.most, kind)

    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        return [[7] * count for _, count in wanted]

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def close(self) -> None:
        self.closed = True


def known(name: str) -> Request:
    return Request.of(make_request([1, 2, 3], request_id=name))


def lengths(speculation: Speculation, *names: str, decodes: int | None = None, room: int = 1000) -> dict[str, int]:
    candidates = [(known(name), 100) for name in names]
    drafts = speculation.draft(candidates, len(names) if decodes is None else decodes, room)
    return {sequence.request_id: len(draft) for sequence, draft in drafts}


def test_cheap_verification_of_good_guesses_is_used_to_the_full() -> None:
    assert lengths(Speculation(Guesses({"a": 2}), CHEAP, 32), "a") == {"a": 32}


def test_dear_verification_is_left_alone() -> None:
    assert lengths(Speculation(Guesses({"a": 2}), DEAR, 32), "a") == {}


def test_poor_guesses_get_short_drafts() -> None:
    cost = VerifyCost((1, 2, 4, 8, 16, 32), (10.0, 12.0, 14.0, 18.0, 26.0, 42.0))
    by_kind = {kind: lengths(Speculation(Guesses({"a": kind}), cost, 32), "a").get("a", 0) for kind in range(3)}
    assert by_kind[0] == 0
    assert 1 <= by_kind[1] <= 4
    assert by_kind[2] >= 12


def test_load_drives_drafts_out() -> None:
    """With many sequences a step already costs what its tokens cost, and only a near-certain token is worth its share."""
    cost = VerifyCost((1, 8, 64), (10.0, 12.0, 96.0))
    names = [f"r{i}" for i in range(40)]
    speculation = Speculation(Guesses(), cost, 8)
    assert lengths(speculation, *names[:1])
    assert lengths(speculation, *names) == {}


def test_the_room_goes_to_the_best_guesses_first() -> None:
    guesses = Guesses({"poor": 1, "good": 2, "none": None})
    assert lengths(Speculation(guesses, CHEAP, 32), "poor", "none", "good", room=33) == {"good": 32, "poor": 1}


def test_rejections_end_it_and_time_brings_it_back() -> None:
    speculation = Speculation(Guesses(), VerifyCost((1, 2, 32), (10.0, 13.0, 60.0)), 32)
    tries = [0] * 10
    for number in range(10):
        while (drafted := lengths(speculation, f"r{number}").get(f"r{number}", 0)) and tries[number] < 100:
            speculation.verified(f"r{number}", drafted, 0)
            tries[number] += 1
    assert 1 <= tries[0] <= 10, "a guess that never holds is soon given up"
    assert tries[-1] == 0, "others learn from it"
    waits = 0
    while not lengths(speculation, f"later {waits}") and waits < 5000:
        waits += 1
    assert 10 < waits < 5000


def test_acceptance_makes_drafts_longer_for_this_sequence_at_once() -> None:
    cost = VerifyCost((1, 2, 32), (10.0, 13.0, 60.0))
    speculation = Speculation(Guesses(), cost, 32)
    first = lengths(speculation, "a")["a"]
    for _ in range(6):
        drafted = lengths(speculation, "a")["a"]
        speculation.verified("a", drafted, drafted)
    assert lengths(speculation, "a")["a"] > first


def test_kinds_are_measured_by_themselves() -> None:
    guesses = Guesses({"a": 1, "b": 2})
    speculation = Speculation(guesses, VerifyCost((1, 2, 32), (10.0, 13.0, 60.0)), 32)
    for _ in range(30):
        drafted = lengths(speculation, "a", "b")
        if "a" in drafted:
            speculation.verified("a", drafted["a"], 0)
        if "b" in drafted:
            speculation.verified("b", drafted["b"], drafted["b"])
    assert set(lengths(speculation, "a", "b")) == {"b"}


def test_one_slow_proposal_is_not_the_last() -> None:
    class SlowAtFirst(Guesses):
        calls = 0

        def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
            self.calls += 1
            if self.calls == 2:  # what a sequence's first one takes does not count
                clock[0] += 0.5
            return super().propose(wanted)

    clock = [0.0]
    guesses = SlowAtFirst({"a": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inferflux_core.engine.speculation.time.perf_counter", lambda: clock[0])
        speculation = Speculation(guesses, CHEAP, 32)
        asked = []
        for _ in range(3000):
            drafted = lengths(speculation, "a").get("a", 0)
            speculation.verified("a", drafted, drafted)
            asked.append(bool(drafted))
    assert asked[:3] == [True, True, False]
    assert asked[-1]


def test_a_guess_that_a_constraint_forbids_did_not_hold() -> None:
    """Half of it may have been verified, or none: the token that is forbidden counts as one that was wrong."""
    speculation = Speculation(Guesses(), VerifyCost((1, 2, 32), (10.0, 13.0, 60.0)), 32)
    tries = 0
    while tries < 100 and (drafted := lengths(speculation, "a").get("a")):
        speculation.verified("a", min(1, drafted - 1), 0) if tries % 2 else speculation.verified("a", 0, 0)
        tries += 1
    assert 1 <= tries <= 20
    assert speculation.counters.draft_tokens <= tries // 2, "only what was verified is told"


def test_counters_by_position() -> None:
    speculation = Speculation(Guesses({"a": 2}, most=3), CHEAP, 32)
    lengths(speculation, "a")
    speculation.verified("a", 3, 2)
    lengths(speculation, "a")
    speculation.verified("a", 3, 0)
    speculation.verified("a", 3, 3)  # nobody drafted that
    counters = speculation.counters
    assert (counters.drafts, counters.draft_tokens, counters.accepted_tokens) == (2, 6, 2)
    assert (counters.draft_tokens_per_pos, counters.accepted_tokens_per_pos) == ([2, 2, 2], [1, 1, 0])
    assert counters.draft_seconds > 0


def test_ends_reach_the_proposer() -> None:
    guesses = Guesses()
    speculation = Speculation(guesses, CHEAP, 8)
    speculation.forget("a")
    speculation.close()
    assert (guesses.forgotten, guesses.closed) == (["a"], True)


# --- in the scheduler -------------------------------------------------------------------------------------------------

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)
PROMPT = [10, 20, 30]


def engine(speculation: Speculation | None = None, depth: int = 1, **settings: object) -> EngineDriver:
    runner = FakeRunner(FakeSettings.model_validate({"depth": depth, **settings}), CONFIG)
    return EngineDriver(runner, CONFIG, speculation=speculation)


def answer() -> list[int]:
    return engine().generate(make_request(PROMPT, max_tokens=24, ignore_eos=True))[0].token_ids


@pytest.mark.parametrize("depth", [1, 2])
def test_a_right_draft_takes_one_step(depth: int) -> None:
    drafts = ScriptedDrafts([(PROMPT, answer())], length=8)
    driver = engine(drafts.always(), depth)
    assert driver.generate(make_request(PROMPT, max_tokens=24, ignore_eos=True))[0].token_ids == answer()
    stats = driver.core.stats()
    # The prompt brings the first token, each further step 8 drafts and one more; the last one has room for 4 drafts.
    assert (stats.spec_drafts, stats.spec_draft_tokens, stats.spec_accepted_tokens) == (3, 20, 20)
    assert stats.num_steps == 4
    assert stats.generation_tokens == 24


def test_a_wrong_token_costs_what_comes_after_it() -> None:
    drafts = ScriptedDrafts([(PROMPT, answer())], wrong_every=6, length=8)
    driver = engine(drafts.always())
    assert driver.generate(make_request(PROMPT, max_tokens=13, ignore_eos=True))[0].token_ids == answer()[:13]
    stats = driver.core.stats()
    # 1 | 4 hold, the 5th (6th of the answer) is replaced | 5 hold, the 6th (12th) is replaced | the last one is plain
    assert (stats.spec_drafts, stats.spec_draft_tokens, stats.spec_accepted_tokens) == (2, 14, 9)
    assert stats.spec_accepted_tokens_per_pos[:6] == [2, 2, 2, 2, 1, 0]
    assert stats.num_steps == 4


def test_a_request_may_turn_it_off_or_shorten_it() -> None:
    for most, expected in ((0, 0), (2, 2)):
        drafts = ScriptedDrafts([(PROMPT, answer())], length=8)
        driver = engine(drafts.always())
        driver.generate(make_request(PROMPT, max_tokens=24, ignore_eos=True, num_speculative_tokens=most))
        assert len(driver.core.stats().spec_draft_tokens_per_pos) == expected


def test_penalised_sequences_get_none() -> None:
    drafts = ScriptedDrafts([(PROMPT, answer())], length=8)
    driver = engine(drafts.always())
    driver.generate(make_request(PROMPT, max_tokens=24, frequency_penalty=0.5))
    assert driver.core.stats().spec_drafts == 0


def test_an_end_within_a_draft_ends_the_request_there() -> None:
    stop = answer()[5]
    expected = answer()[: answer().index(stop)]
    drafts = ScriptedDrafts([(PROMPT, answer())], length=16)
    driver = engine(drafts.always())
    got = driver.generate(make_request(PROMPT, max_tokens=24, ignore_eos=True, stop_token_ids=frozenset([stop])))[0]
    assert got.token_ids == expected
    assert got.finish_reason == "stop"


def test_nobody_is_preempted_for_a_guess() -> None:
    """Room for one more block: the draft is left out, and the sequence goes on without it."""
    drafts = ScriptedDrafts([(PROMPT, answer())], length=16)
    driver = engine(drafts.always(), block_size=4, num_blocks=7, max_model_len=24)
    got = driver.generate(make_request(PROMPT, max_tokens=20, ignore_eos=True))[0]
    assert got.token_ids == answer()[:20]
    assert driver.core.stats().num_preemptions == 0
