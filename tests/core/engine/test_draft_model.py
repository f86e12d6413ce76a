"""The draft-model proposer: what it proposes, and that its books follow every sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from inferflux_core.engine.draft_model import DraftModelProposer, make
from inferflux_core.engine.request import Request
from inferflux_core.engine.shared_vocabulary import SharedVocabulary
from inferflux_core.engine.types import EngineRequest, ModelRunnerOutput, Row, SamplingParams, SchedulerOutput
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import (
    DraftModel,
    EngineConfig,
    KnownSequence,
    ModelInfo,
    ModelRunner,
    NoSettings,
    Outlook,
    ProposerContext,
    Ticket,
)
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import VOCAB_SIZE, FakeRunner, FakeTokenizer
from inferflux_core.testing.fake_settings import FakeSettings

ALL = SharedVocabulary(VOCAB_SIZE, frozenset(), 257)
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {"layout": "paged", "block_size": 8, "num_blocks": 256},
    "streams": {"layout": "sequence", "block_size": 8},
    "pool": {"layout": "sequence", "block_size": 8, "pool_tokens": 1024},
    "device": {"layout": "paged", "block_size": 8, "num_blocks": 256, "depth": 2},
}


@dataclass
class Known:
    """A running sequence, as a proposer sees it."""

    request_id: str
    tokens: list[int]
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
    num_prompt_tokens: int = 8


class Watched(FakeRunner):
    """Keeps what it was asked to compute; a token it draws may be replaced by position."""

    def __init__(self, settings: FakeSettings, config: EngineConfig, err: Callable[[int, int], int] | None = None) -> None:
        super().__init__(settings, config)
        self.steps: list[list[Row]] = []
        self.freed: list[int] = []
        self.is_closed = False
        self._err = err

    def launch(self, plan: SchedulerOutput) -> Ticket:
        self.steps.append(plan.rows)
        self.freed += plan.free
        return super().launch(plan)

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        output = super().collect(ticket)
        if self._err is not None:
            sampled = [row for row in ticket.plan.rows if row.sample]
            output.tokens = [
                [self._err(row.start + row.n, tokens[0])] for row, tokens in zip(sampled, output.tokens, strict=True)
            ]
        return output

    def close(self) -> None:
        self.is_closed = True
        super().close()

    def computed(self) -> list[tuple[int, int]]:
        """(start, n) of all rows since the last call."""
        rows = [(row.start, row.n) for rows in self.steps for row in rows]
        self.steps.clear()
        return rows


def watched(config: EngineConfig = CONFIG, **settings: Any) -> Watched:
    return Watched(FakeSettings(**{**LAYOUTS["paged"], **settings}), config)


def proposer_of(runner: ModelRunner, vocabulary: SharedVocabulary = ALL) -> DraftModelProposer:
    return DraftModelProposer(runner, vocabulary, FakeTokenizer.eos_token_ids)


def prompt(length: int, variant: int = 0) -> list[int]:
    return [65 + (7 * i + variant * (i + 3)) % 26 for i in range(length)]  # the model itself writes in lower case


def salted(name: str, tokens: list[int], salt: str = "") -> Request:
    """A sequence that tells whom it may share prefixes with."""
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    return Request.of(EngineRequest(request_id=name, prompt_token_ids=tokens, params=params, cache_salt=salt))


def answer_to(tokens: Sequence[int], length: int, **params: Any) -> list[int]:
    """What the fake model itself says."""
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=512, max_model_len=512)
    driver = EngineDriver(FakeRunner(FakeSettings(), config), config)
    answer = driver.generate(make_request(tokens, max_tokens=length, **{"ignore_eos": True, **params}))[0]
    driver.core.close()
    return answer.token_ids


def ask(proposer: DraftModelProposer, *wanted: tuple[KnownSequence, int]) -> list[list[int]]:
    drafts = [list(draft) for draft in proposer.propose(wanted)]
    proposer.check_integrity()
    return drafts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_equal_model_proposes_what_the_target_says(layout: str) -> None:
    runner = watched(**LAYOUTS[layout])
    proposer = proposer_of(runner)
    first, second = Known("a", prompt(8)), Known("b", prompt(20, 1))
    said = {"a": answer_to(first.tokens, 60), "b": answer_to(second.tokens, 60)}
    for n in (5, 1, 8, 3):
        drafts = ask(proposer, (first, n), (second, n + 1))
        assert drafts == [said["a"][:n], said["b"][: n + 1]]
        for sequence, draft in zip((first, second), drafts, strict=True):  # all accepted, and the target's own token
            sequence.tokens += said[sequence.request_id][: len(draft) + 1]
            del said[sequence.request_id][: len(draft) + 1]
    proposer.close()
    assert runner.is_closed


def test_a_seed_draws_the_targets_tokens() -> None:
    params: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 5}
    sequence = Known("a", prompt(8), SamplingParams(max_tokens=99, ignore_eos=True, **params))
    said = answer_to(sequence.tokens, 20, **params)
    assert said != answer_to(sequence.tokens, 20)
    proposer = proposer_of(watched())
    assert ask(proposer, (sequence, 6)) == [said[:6]]
    sequence.tokens += said[:3]
    assert ask(proposer, (sequence, 6)) == [said[3:9]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejected_guesses_are_taken_back_and_right_ones_kept(layout: str) -> None:
    runner = watched(**LAYOUTS[layout])
    proposer = proposer_of(runner)
    sequence = Known("a", prompt(8))
    draft = ask(proposer, (sequence, 6))[0]
    assert runner.computed() == [(0, 8), *((8 + i, 1) for i in range(5))]
    sequence.tokens += [*draft[:2], ord("~")]  # two held, the third did not
    said = answer_to(sequence.tokens, 9)
    assert ask(proposer, (sequence, 3)) == [said[:3]]
    assert runner.computed() == [(10, 1), (11, 1), (12, 1)]
    sequence.tokens += said[:4]  # all held: only the last guess and the token after it are not computed
    assert ask(proposer, (sequence, 1)) == [said[4:5]]
    assert runner.computed() == [(13, 2)]
    assert ask(proposer, (sequence, 2)) == [said[4:6]], "asked again, though nothing was learnt"
    assert runner.computed() == [(14, 1), (15, 1)]
    sequence.tokens.append(said[4])  # fewer than were proposed were verified, and all of them held
    assert ask(proposer, (sequence, 2)) == [said[5:7]]
    assert runner.computed() == [(15, 1), (16, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_prompt_is_read_in_pieces_beside_the_others(layout: str) -> None:
    runner = watched(**LAYOUTS[layout])
    proposer = proposer_of(runner)
    long, short = Known("long", prompt(150, 1)), Known("short", prompt(8))
    said = answer_to(short.tokens, 50)
    for call in range(3):
        drafts = ask(proposer, (long, 4), (short, 4))
        assert proposer.outlook(long) is not None
        assert drafts == [[], said[5 * call : 5 * call + 4]]
        assert sum(row.n for row in runner.steps[0]) <= CONFIG.max_num_batched_tokens
        assert all(row.n == 1 for rows in runner.steps[1:] for row in rows), "the long one is read in the first step only"
        runner.steps.clear()
        short.tokens += said[5 * call : 5 * call + 5]
        long.tokens.append(ord("x"))
    assert ask(proposer, (long, 4)) == [answer_to(long.tokens, 4)]


def test_a_common_beginning_is_read_once() -> None:
    runner = watched()
    proposer = proposer_of(runner)
    same = prompt(60, 1)
    requests = [salted(name, [*same, ord(name)], salt) for name, salt in (("a", ""), ("b", ""), ("c", ""), ("d", "other"))]
    for _ in range(4):
        drafts = proposer.propose([(request, 2) for request in requests])
        proposer.check_integrity()
    assert drafts == [answer_to(request.tokens, 2) for request in requests]
    read = [n for _, n in runner.computed() if n > 1]
    assert sum(read) < 2 * 61 + 4 * 8, "the three of one salt read it once, and the one of another salt for itself"


def test_strangers_share_nothing() -> None:
    runner = watched()
    proposer = proposer_of(runner)
    for name in "ab":
        ask(proposer, (Known(name, prompt(40)), 1))
    assert runner.computed() == [(0, 40), (0, 40)]


def test_a_preempted_sequence_finds_what_it_had() -> None:
    runner = watched()
    proposer = proposer_of(runner)
    sequence = Known("a", prompt(20))
    said = answer_to(sequence.tokens, 9)
    assert ask(proposer, (sequence, 4)) == [said[:4]]
    proposer.forget("a")
    proposer.check_integrity()
    runner.computed()
    sequence.tokens += said[:2]
    assert ask(proposer, (sequence, 4)) == [said[2:6]]
    assert runner.computed()[0] == (16, 6)
    assert runner.freed == [0]
    proposer.forget("a")
    proposer.forget("never seen")
    proposer.check_integrity()


def test_idle_sequences_make_room_and_wanted_ones_do_not() -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256)
    proposer = proposer_of(watched(config))
    a, b, c = (Known(name, prompt(8, i)) for i, name in enumerate("abc"))
    answers = {k.request_id: answer_to(k.tokens, 2) for k in (a, b, c)}
    assert ask(proposer, (a, 2), (b, 2), (c, 2)) == [answers["a"], answers["b"], []]
    assert ask(proposer, (a, 2)) == [answers["a"]]
    assert ask(proposer, (a, 2), (c, 2)) == [answers["a"], answers["c"]], "b was not wanted, and lost its slot"
    assert ask(proposer, (b, 2)) == [answers["b"]]


@pytest.mark.parametrize("layout", [{"num_blocks": 11}, {"layout": "sequence", "pool_tokens": 80}], ids=["paged", "pool"])
def test_without_room_it_is_silent(layout: dict[str, Any]) -> None:
    proposer = proposer_of(watched(**layout))
    a, b = Known("a", prompt(30)), Known("b", prompt(60, 1))
    said = answer_to(a.tokens, 40)
    assert ask(proposer, (a, 3), (b, 3)) == [said[:3], []]
    a.tokens += said[:30]
    assert ask(proposer, (a, 3), (b, 3)) == [said[30:33], []]
    proposer.forget("a")
    ask(proposer, (b, 3))
    b.tokens.append(ord("x"))
    assert ask(proposer, (b, 3)) == [answer_to(b.tokens, 3)]
    b.tokens += answer_to(b.tokens, 19)
    assert ask(proposer, (b, 5)) == [answer_to(b.tokens, 1)], "80 cells are full, and the last guess needs none"
    assert proposer.outlook(b) == Outlook(1)


@pytest.mark.parametrize("layout", [{"num_blocks": 11}, {"layout": "sequence", "pool_tokens": 80}], ids=["paged", "pool"])
def test_what_outgrows_the_room_leaves_it_to_the_others(layout: dict[str, Any]) -> None:
    proposer = proposer_of(watched(**layout))
    a, b = Known("a", prompt(32)), Known("b", prompt(30, 1))
    said = answer_to(a.tokens, 40)
    assert ask(proposer, (b, 2), (a, 2)) == [answer_to(b.tokens, 2), said[:2]]
    a.tokens.append(said[0])
    b.tokens += [ord("y")] * 20
    assert ask(proposer, (b, 2), (a, 2)) == [[], said[1:3]], "no room for all of b"
    a.tokens += said[1:27]
    assert ask(proposer, (b, 2), (a, 2)) == [[], said[27:29]], "a has the room that b gave back"


def test_a_second_token_after_a_wrong_guess() -> None:
    """It was not asked in between, as when a grammar's forced tokens were verified instead."""
    runner = watched()
    proposer = proposer_of(runner)
    sequence = Known("a", prompt(8))
    ask(proposer, (sequence, 6))
    sequence.tokens += [ord("~"), ord("~"), ord("a")]
    runner.computed()
    assert ask(proposer, (sequence, 2)) == [answer_to(sequence.tokens, 2)]
    assert runner.computed() == [(8, 3), (11, 1)]


def test_it_goes_on_to_the_end_of_its_context() -> None:
    proposer = proposer_of(watched(max_model_len=40))
    sequence = Known("a", prompt(30))
    said = answer_to(sequence.tokens, 12)
    assert proposer.outlook(sequence) == Outlook(11)
    assert ask(proposer, (sequence, 100)) == [said[:11]]
    sequence.tokens += said[:10]
    assert ask(proposer, (sequence, 5)) == [said[10:11]]
    sequence.tokens.append(said[10])
    assert proposer.outlook(sequence) is None
    assert ask(proposer, (sequence, 5)) == [[]]


def test_it_stops_where_the_target_would() -> None:
    tokens = prompt(9, 4)
    said = answer_to(tokens, 6, ignore_eos=False)
    assert len(said) == 3, "the model ends early here"

    def first(vocabulary: SharedVocabulary = ALL, **params: Any) -> list[int]:
        given = SamplingParams(**{"max_tokens": 99, "temperature": 0.0, **params})
        return ask(proposer_of(watched(), vocabulary), (Known("a", tokens, given, len(tokens)), 6))[0]

    assert first() == [*said, 259], "the end is proposed, and nothing after it"
    assert first(min_tokens=3) == [*said, 259]
    assert first(min_tokens=4) == said, "the target cannot end there"
    assert first(stop_token_ids=frozenset({said[1]})) == said[:2]
    assert first(SharedVocabulary(VOCAB_SIZE, frozenset({said[1]}), 257)) == said[:1], "the target does not have that token"
    assert first(SharedVocabulary(259, frozenset(), 257)) == said
    assert first(frequency_penalty=0.1) == []


def test_tokens_that_the_draft_lacks_are_read_as_an_end() -> None:
    proposer = proposer_of(watched(), SharedVocabulary(VOCAB_SIZE, frozenset({100}), 257))
    assert ask(proposer, (Known("a", [97, 100, 98, 5000]), 3)) == [answer_to([97, 257, 98, 257], 3)]


def context(draft_runner: ModelRunner, tokenizer: FakeTokenizer | None = None) -> ProposerContext:
    return ProposerContext(
        target="large",
        config=CONFIG,
        model_info=ModelInfo(vocab_size=VOCAB_SIZE, max_model_len=256, eos_token_ids=frozenset({259})),
        tokenizer=FakeTokenizer,
        load_draft=lambda: DraftModel(name="little", runner=draft_runner, tokenizer=tokenizer or FakeTokenizer()),
    )


def test_made_from_its_context() -> None:
    runner = watched()
    proposer = make(NoSettings(), context(runner))
    assert list(proposer.propose([(Known("a", prompt(8)), 2)])[0]) == answer_to(prompt(8), 2)
    assert proposer.prior(0) == 0.6
    proposer.close()
    assert runner.is_closed


def test_a_draft_that_cannot_take_back_is_refused_and_released() -> None:
    runner = watched(layout="sequence", can_trim=False)
    with pytest.raises(ModelFileError, match=r"draft model 'little' cannot draft: .* recurrent .* swa_full to true"):
        make(NoSettings(), context(runner))
    assert runner.is_closed


def test_a_draft_of_another_vocabulary_is_refused_and_released() -> None:
    class Shifted(FakeTokenizer):
        def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
            return super().token_bytes((token_id + 1) % 256 if token_id < 256 else token_id, special=special)

    runner = watched()
    with pytest.raises(ModelFileError, match=r"draft model 'little' cannot draft .* 256 of their first 260 tokens differ"):
        make(NoSettings(), context(runner, Shifted()))
    assert runner.is_closed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_that_errs_is_right_as_often_as_it_agrees(layout: str) -> None:
    """It takes another token at every third position; what follows its guess is then no use either."""

    def err(position: int, token: int) -> int:
        return ord("~") if position % 3 == 0 else token

    runner = Watched(FakeSettings(**LAYOUTS[layout]), CONFIG, err)
    proposer = proposer_of(runner)
    sequence = Known("a", prompt(9))
    said = answer_to(sequence.tokens, 30)
    accepted = []
    while len(sequence.tokens) < 36:
        at = len(sequence.tokens) - 9
        (draft,) = ask(proposer, (sequence, 4))
        held = next(i for i, (guess, token) in enumerate(zip(draft, said[at:], strict=False)) if guess != token)
        sequence.tokens += said[at : at + held + 1]
        accepted.append(held)
    assert accepted == [0, *[2] * 9][: len(accepted)]
