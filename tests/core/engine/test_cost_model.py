"""The cost of steps, learnt while they run."""

from __future__ import annotations

import random

import pytest

from inferflux_core.engine.cost_model import StepCostModel


def test_what_a_load_never_shows_does_not_upset_the_rest() -> None:
    """Without drafts and prompts for thousands of steps: one disturbed step moves what was learnt as little as before."""
    model = StepCostModel()
    chance = random.Random(1)
    moved = []
    for _ in range(6000):
        decodes = chance.randint(1, 16)
        before = model.predict(0, 8, 2400)
        model.observe(0, decodes, decodes * 300, 5.0 + 0.3 * decodes + chance.random())
        moved.append(abs(model.predict(0, 8, 2400) - before))
    assert max(moved[200:]) < 0.15
    assert model.predict(0, 8, 2400) == pytest.approx(5.5 + 2.4, abs=0.2)
