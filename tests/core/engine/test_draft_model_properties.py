"""Whatever happens to the sequences, the draft-model proposer's books are in order and its proposals those of a fresh one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engine.test_draft_model import ALL, Known, Watched, ask, prompt, proposer_of, salted
from inferflux_core.engine.draft_model import DraftModelProposer
from inferflux_core.interfaces import EngineConfig, KnownSequence
from inferflux_core.testing.fake_settings import FakeSettings

SEQUENCES = 4
CONFIG = EngineConfig(max_num_seqs=3, max_num_batched_tokens=24, max_model_len=96)
AMPLE = EngineConfig(max_num_seqs=1, max_num_batched_tokens=256, max_model_len=256)

TIGHT: dict[str, dict[str, Any]] = {
    "paged": {"layout": "paged", "block_size": 4, "num_blocks": 30},
    "device": {"layout": "paged", "block_size": 4, "num_blocks": 30, "depth": 2},
    "streams": {"layout": "sequence", "block_size": 4, "num_streams": 4},
    "pool": {"layout": "sequence", "block_size": 4, "pool_tokens": 120},
}

indices = st.integers(0, SEQUENCES - 1)
events = st.one_of(
    proposals := st.tuples(
        st.just("propose"), st.lists(st.tuples(indices, st.integers(1, 6)), min_size=1, unique_by=lambda w: w[0])
    ),
    proposals,  # twice, to have more of them
    st.tuples(st.just("accept"), indices, st.integers(0, 6), st.lists(st.sampled_from([ord("~"), ord("a")]), max_size=3)),
    st.tuples(st.just("forget"), indices),
    st.tuples(st.just("end"), indices, st.integers(1, 70)),
)


def fresh(tokens: Sequence[int], at_most: int) -> list[int]:
    """What a proposer that never saw the sequence says after it."""
    proposer = proposer_of(Watched(FakeSettings(num_blocks=64), AMPLE))
    return settled(proposer, Known("fresh", list(tokens)), at_most)


def settled(proposer: DraftModelProposer, sequence: KnownSequence, at_most: int) -> list[int]:
    return next(draft for draft in (ask(proposer, (sequence, at_most))[0] for _ in range(20)) if draft)


@pytest.mark.parametrize("layout", TIGHT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    script=st.lists(events, min_size=5, max_size=30),
    beginnings=st.lists(st.integers(1, 40), min_size=SEQUENCES, max_size=SEQUENCES),
)
def test_any_history_gives_the_proposals_of_a_fresh_proposer(
    layout: str, script: list[tuple[Any, ...]], beginnings: list[int]
) -> None:
    proposer = proposer_of(Watched(FakeSettings(**TIGHT[layout]), CONFIG), ALL)
    sequences = [salted(f"r{i}", prompt(n, i // 2)) for i, n in enumerate(beginnings)]  # two of them begin alike
    drafts: list[list[int]] = [[] for _ in sequences]
    names = iter(range(10_000))
    for event in script:
        match event:
            case ("propose", wanted):
                asked = [(sequences[i], k) for i, k in wanted if proposer.outlook(sequences[i]) is not None]
                for (sequence, k), draft in zip(asked, ask(proposer, *asked), strict=True):
                    drafts[sequences.index(sequence)] = draft
                    assert len(draft) <= k
                    if draft:
                        assert draft == fresh(sequence.tokens, k)[: len(draft)]
            case ("accept", i, held, correction):
                if len(sequences[i].tokens) < 110:
                    sequences[i].tokens += [*drafts[i][:held], *correction]
                drafts[i] = []
            case ("forget", i):
                proposer.forget(sequences[i].request_id)
            case ("end", i, length):
                proposer.forget(sequences[i].request_id)
                sequences[i], drafts[i] = salted(f"n{next(names)}", prompt(length, i // 2)), []
        proposer.check_integrity()
    for sequence in sequences:
        proposer.forget(sequence.request_id)
    proposer.check_integrity()
    last = Known("last", prompt(40, 3))
    assert settled(proposer, last, 5) == fresh(last.tokens, 5), "everything was given back"
