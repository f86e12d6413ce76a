"""Engines that cannot be made leave nothing behind."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from inferflux_core.engine.engine_spec import EngineSpec, SpeculativeSpec
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.types import Constraint, ConstraintState, FinishReason
from inferflux_core.errors import ConfigError
from inferflux_core.interfaces import EngineConfig, ModelFiles
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import VOCAB_SIZE, FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings
from inferflux_core.testing.token_sets import TokenSets, only


def test_a_failure_closes_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[FakeRunner] = []
    monkeypatch.setattr(FakeRunner, "close", lambda self: closed.append(self))
    spec = EngineSpec(
        files=ModelFiles(ref="fake", format="fake", paths=()),
        backend="fake",
        structured_output=True,
        speculative=SpeculativeSpec(method="draft_model"),
    )
    before = threading.active_count()
    with pytest.raises(ConfigError, match="needs a draft model"):
        EngineCore.build(spec, load_plugins())
    assert len(closed) == 1
    assert threading.active_count() == before, "the threads of grammars have ended"


def test_an_abort_takes_a_constraint_out_of_the_line() -> None:
    waiting: Future[ConstraintState] = Future()

    class Slow(TokenSets):
        def compile(self, salt: str, constraint: Constraint) -> Future[ConstraintState]:
            return waiting

    config = EngineConfig()
    driver = EngineDriver(FakeRunner(FakeSettings(), config), config, constraints=Slow(VOCAB_SIZE))
    driver.add(make_request([1, 2], request_id="a", constraint=only({1})))
    driver.abort("a")
    assert waiting.cancelled()
    assert driver.answers["a"].finish_reason is FinishReason.ABORT
    assert not driver.core.has_requests()
