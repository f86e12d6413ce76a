"""How a constraint begins and ends a sequence in the engine, without a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from inferflux_core.engine.types import Constraint, ConstraintState, FinishReason, GrammarMask, SchedulerOutput
from inferflux_core.interfaces import EngineConfig
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)
PROMPT = [10, 20, 30]


@dataclass
class Script:
    """A constraint that permits all, and finishes or fails after some tokens."""

    finish_after: int = 1000
    fail_after: int = 1000
    seen: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        return len(self.seen) >= self.finish_after

    def forced(self, at_most: int) -> list[int]:
        return []

    def allowed(self, draft: Sequence[int]) -> int:
        return len(draft)

    def advance(self, tokens: Sequence[int]) -> None:
        self.seen += tokens
        if len(self.seen) >= self.fail_after:
            self.error = "the grammar became too complex"


@dataclass
class Scripts:
    """Hands out one state when the test says so. Its masks permit all; making one may fail, as a grammar's limits do."""

    state: Script = field(default_factory=Script)
    compiled: Future[ConstraintState] = field(default_factory=Future)
    break_mask_at: int = 1000
    closed: bool = False

    def compile(self, salt: str, constraint: Constraint) -> Future[ConstraintState]:
        return self.compiled

    def begin(self, plan: SchedulerOutput) -> Scripts | None:
        if len(self.state.seen) >= self.break_mask_at:
            self.state.error = "no mask could be made"
        return self

    def result(self) -> GrammarMask | None:
        return None

    def close(self) -> None:
        self.closed = True


def engine(scripts: Scripts | None, depth: int = 1) -> EngineDriver:
    return EngineDriver(FakeRunner(FakeSettings.model_validate({"depth": depth}), CONFIG), CONFIG, constraints=scripts)


def plain(count: int) -> list[int]:
    return engine(None).generate(make_request(PROMPT, max_tokens=count, ignore_eos=True))[0].token_ids


@pytest.mark.parametrize("depth", [1, 2])
def test_a_finished_constraint_ends_the_sequence_without_another_step(depth: int) -> None:
    scripts = Scripts(Script(finish_after=5))
    scripts.compiled.set_result(scripts.state)
    driver = engine(scripts, depth)
    answer = driver.generate(make_request(PROMPT, max_tokens=20, ignore_eos=True, constraint=Constraint(grammar="x")))[0]
    assert (answer.token_ids, answer.finish_reason) == (plain(5), FinishReason.STOP)
    assert scripts.state.seen == plain(5)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_constraint_that_fails_ends_the_sequence_with_its_reason(depth: int) -> None:
    scripts = Scripts(Script(fail_after=3))
    scripts.compiled.set_result(scripts.state)
    other = make_request([40, 50], max_tokens=12, ignore_eos=True)
    alone = engine(None).generate(other)[0].token_ids
    driver = engine(scripts, depth)
    doomed = make_request(PROMPT, max_tokens=20, ignore_eos=True, constraint=Constraint(grammar="x"))
    answers = driver.generate(doomed, other)
    assert (answers[0].finish_reason, answers[0].error) == (FinishReason.ERROR, "the grammar became too complex")
    assert answers[1].token_ids == alone, "nobody else is hurt"


def test_what_was_drawn_without_a_mask_is_not_shown_even_if_it_would_end_the_sequence() -> None:
    tokens = plain(12)
    at = max(i for i, token in enumerate(tokens) if token not in tokens[:i])
    scripts = Scripts(break_mask_at=at)
    scripts.compiled.set_result(scripts.state)
    driver = engine(scripts)
    request = make_request(
        PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=frozenset([tokens[at]]), constraint=Constraint(grammar="x")
    )
    answer = driver.generate(request)[0]
    assert (answer.token_ids, answer.finish_reason) == (tokens[:at], FinishReason.ERROR)
    assert answer.error == "no mask could be made"


def test_compiling_holds_up_nobody_else_and_can_be_aborted() -> None:
    scripts = Scripts()
    driver = engine(scripts)
    waiting, other = (
        make_request(PROMPT, max_tokens=4, ignore_eos=True, constraint=Constraint(grammar="x")),
        make_request(PROMPT, max_tokens=4, ignore_eos=True),
    )
    driver.add(waiting, other)
    while driver.answers[other.request_id].finish_reason is None:
        driver.step()
    assert driver.core.has_requests(), "one is being compiled"
    assert driver.answers[waiting.request_id].token_ids == []
    driver.abort(waiting.request_id)
    assert driver.answers[waiting.request_id].finish_reason is FinishReason.ABORT
    assert not driver.core.has_requests()
    driver.core.close()
    assert scripts.closed


def test_a_constraint_that_cannot_be_compiled_is_answered_with_its_reason() -> None:
    scripts = Scripts(Script(error="the grammar is empty"))
    scripts.compiled.set_result(scripts.state)
    answer = engine(scripts).generate(make_request(PROMPT, constraint=Constraint(grammar="x")))[0]
    assert (answer.token_ids, answer.finish_reason, answer.error) == ([], FinishReason.ERROR, "the grammar is empty")


def test_a_model_without_structured_output_never_answers_unconstrained() -> None:
    answer = engine(None).generate(make_request(PROMPT, constraint=Constraint(grammar="x")))[0]
    assert (answer.token_ids, answer.finish_reason) == ([], FinishReason.ERROR)
    assert answer.error == "This model was loaded without structured output."
