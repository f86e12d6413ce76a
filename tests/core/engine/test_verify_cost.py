"""What steps cost by their size: measured, kept in order, and corrected."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.engine.types import SchedulerOutput
from inferflux_core.engine.verify_cost import VerifyCost, measure
from inferflux_core.interfaces import EngineConfig, Ticket
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings


def test_between_and_beyond_the_measured_sizes_it_is_linear() -> None:
    cost = VerifyCost((1, 2, 4), (10.0, 12.0, 20.0))
    assert [cost.predict(n) for n in (1, 2, 3, 4, 8)] == [10.0, 12.0, 16.0, 20.0, 36.0]


def test_a_larger_step_never_costs_less() -> None:
    cost = VerifyCost((1, 2, 4), (10.0, 7.0, 9.0))
    assert [cost.predict(n) for n in (1, 2, 4, 9)] == [10.0] * 4


def test_steps_correct_it() -> None:
    cost = VerifyCost((1, 8), (10.0, 20.0))
    for _ in range(100):
        cost.observe(8, 60.0)
    assert cost.predict(8) == pytest.approx(60.0, rel=0.05)
    for _ in range(200):
        cost.observe(1, 10.0)
    assert cost.predict(1) == pytest.approx(10.0, rel=0.05)
    assert cost.predict(8) < 40.0, "what was not seen for long is believed less and less"


def test_one_odd_step_decides_nothing() -> None:
    cost = VerifyCost((1, 8), (10.0, 20.0))
    cost.observe(1, 10_000.0)
    assert cost.predict(1) <= 11.0
    for broken in (0.0, -1.0, math.nan, math.inf):
        cost.observe(1, broken)
    assert cost.predict(1) <= 11.0


@given(
    milliseconds=st.lists(st.floats(0.01, 1e4), min_size=3, max_size=3),
    steps=st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1e6)), max_size=50),
)
def test_predictions_stay_positive_and_ordered_whatever_is_seen(
    milliseconds: list[float], steps: list[tuple[int, float]]
) -> None:
    cost = VerifyCost((1, 4, 16), milliseconds)
    for size, taken in steps:
        cost.observe(size, taken)
    predictions = [cost.predict(n) for n in (1, 2, 4, 9, 16, 64)]
    assert all(0 < p < math.inf for p in predictions)
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(predictions))


@pytest.mark.parametrize("layout", ["paged", "sequence"])
def test_measuring_tells_the_cost_of_a_token_and_leaves_the_engine_as_it_was(layout: str) -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64)
    settings = FakeSettings.model_validate({"layout": layout, "step_ms": 1.0, "token_ms": 0.5})
    runner = FakeRunner(settings, config)
    cost = measure(runner, 8)
    assert cost.predict(9) == pytest.approx(cost.predict(1) + 4.0, rel=0.5)
    driver = EngineDriver(runner, config)
    measured = driver.generate(make_request([10, 20, 30], max_tokens=9), make_request([10, 20, 31], max_tokens=9))
    fresh = EngineDriver(FakeRunner(settings, config), config)
    assert measured == fresh.generate(make_request([10, 20, 30], max_tokens=9), make_request([10, 20, 31], max_tokens=9))


@pytest.mark.parametrize("layout", ["paged", "sequence"])
@pytest.mark.parametrize("limit", [{"max_model_len": 16}, {"max_model_len": 64}, {"max_num_batched_tokens": 16}])
def test_measuring_fits_into_small_models_and_steps(layout: str, limit: dict[str, int]) -> None:
    runner = FakeRunner(FakeSettings.model_validate({"layout": layout}), EngineConfig(**limit))
    most = []
    launch = runner.launch

    def watch(plan: SchedulerOutput) -> Ticket:
        most.append((plan.num_tokens, plan.rows[0].start + plan.rows[0].n))
        return launch(plan)

    runner.launch = watch  # type: ignore[method-assign]  # a spy
    assert measure(runner, 32).predict(9) > 0
    assert max(n for n, _ in most) <= runner.caps.max_num_batched_tokens
    assert max(end for _, end in most) <= runner.model_info.max_model_len
    sizes = sorted({n for n, _ in most[1:]})
    assert sizes[-1] >= 1.5 * sizes[-2], "larger steps are concluded from the last two, which noise must not part"
