"""The process that checks grammars and the engine that compiles them agree on what is too much."""

from __future__ import annotations

from inferflux_core.engine.grammar import parser_limits
from inferflux_core.models.structured import grammar_worker


def test_what_passes_the_check_compiles_in_the_engine() -> None:
    """The process imports nothing of InferFlux, so the limits stand there once more."""
    ours, theirs = parser_limits(), grammar_worker._limits()
    names = [name for name in dir(ours) if not name.startswith("_")]
    assert len(names) >= 8
    assert {name: getattr(theirs, name) for name in names} == {name: getattr(ours, name) for name in names}
