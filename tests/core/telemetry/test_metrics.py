"""Prometheus metrics: what the catalogue promises is there, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferflux_core.engine.types import EngineStats
from inferflux_core.telemetry.catalogue import CATALOGUE
from inferflux_core.telemetry.metrics import Metrics

LIBRARY = ("process_", "python_")


@dataclass
class Model:
    name: str = "tiny"
    state: str = "ready"
    restarts: int = 0
    load_seconds: float | None = 2.5
    stats: EngineStats = field(default_factory=EngineStats)


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.scrape()[0].decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def finish(metrics: Metrics, **changes: object) -> None:
    values: dict[str, object] = {
        "duration": 2.0, "ttft": 0.5, "queue_time": 0.2, "num_generated": 4, "decode_time": 1.5, **changes,
    }  # fmt: skip
    metrics.request_finished("/v1/completions", "tiny", 200, "stop", **values)  # type: ignore[arg-type]  # as named above


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def metrics(model: Model) -> Metrics:
    metrics = Metrics()
    metrics.observe_models(lambda: [model])
    return metrics


def test_the_page_has_exactly_the_catalogue(metrics: Metrics, model: Model) -> None:
    finish(metrics, num_reasoning=2, num_calls=1)
    metrics.inter_token("tiny", 0.01)
    metrics.grammar_compiled(0.01, "ok")
    model.stats = EngineStats(spec_draft_tokens_per_pos=[2, 1], spec_accepted_tokens_per_pos=[1, 0])
    metrics.error("overloaded")
    metrics.queue_rejection("requests")
    metrics.auth_failure("unknown_key")
    metrics.auth_event("oidc", "keys_fetched")
    metrics.policy_decision("casbin", True, 0.001)
    metrics.policy_reload("reloaded")
    metrics.rate_limited("requests")
    metrics.limiter_event("local")
    metrics.audit("records")
    families = {family.name: family for family in text_string_to_metric_families(metrics.scrape()[0].decode())}
    own = {name: family for name, family in families.items() if not name.startswith(LIBRARY)}
    assert own.keys() == {spec.name.removesuffix("_total") for spec in CATALOGUE}
    for spec in CATALOGUE:
        family = own[spec.name.removesuffix("_total")]
        assert family.type == spec.type
        assert family.documentation == spec.description
        assert family.samples, spec.name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(spec.labels)
        if spec.type == "histogram":
            bounds = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
            assert bounds == [*spec.buckets, float("inf")]
    assert "process_resident_memory_bytes" in families
    assert "python_info" in families


def test_names_are_unique_and_follow_the_conventions() -> None:
    names = [spec.name for spec in CATALOGUE]
    assert len(set(names)) == len(names)
    for spec in CATALOGUE:
        assert spec.name.startswith("inferflux_")
        assert spec.name.endswith("_total") is (spec.type == "counter")
        assert bool(spec.buckets) is (spec.type == "histogram")
        assert list(spec.buckets) == sorted(spec.buckets)


def test_two_servers_in_one_process_do_not_share(metrics: Metrics) -> None:
    metrics.error("x")
    assert 'inferflux_errors_total{reason="x"}' not in samples(Metrics())


def test_a_finished_request(metrics: Metrics) -> None:
    finish(metrics)
    values = samples(metrics)
    assert values['inferflux_requests_total{endpoint="/v1/completions",finish_reason="stop",status="200"}'] == 1
    sums = {
        "time_to_first_token_seconds": 0.5,
        "request_duration_seconds": 2.0,
        "request_queue_time_seconds": 0.2,
        "request_prefill_time_seconds": 0.3,
        "request_decode_time_seconds": 1.5,
        "request_time_per_output_token_seconds": 0.5,
    }
    for name, value in sums.items():
        assert values[f'inferflux_{name}_sum{{model="tiny"}}'] == pytest.approx(value), name
        assert values[f'inferflux_{name}_count{{model="tiny"}}'] == 1, name


def test_a_request_that_generated_nothing(metrics: Metrics) -> None:
    metrics.request_finished(
        "/v1/completions", "tiny", 503, "", duration=1.0, ttft=None, queue_time=None, num_generated=0, decode_time=None
    )
    values = samples(metrics)
    assert values['inferflux_requests_total{endpoint="/v1/completions",finish_reason="",status="503"}'] == 1
    assert not [name for name in values if "_seconds_count" in name]


def test_one_token_has_no_time_per_token(metrics: Metrics) -> None:
    finish(metrics, num_generated=1, decode_time=0.0)
    assert not [name for name in samples(metrics) if name.startswith("inferflux_request_time_per_output_token_seconds_count")]


def test_many_model_names_make_one_series(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.inter_token(f"model-{number}", 0.01)
        metrics.request_finished(
            "/v1/completions", f"m{number}", 200, "stop",
            duration=1.0, ttft=None, queue_time=None, num_generated=0, decode_time=None,
        )  # fmt: skip
    metrics.inter_token("tiny", 0.01)
    values = samples(metrics)
    counts = {name: value for name, value in values.items() if "_count" in name}
    assert counts == {
        'inferflux_inter_token_latency_seconds_count{model="unknown"}': 1000,
        'inferflux_inter_token_latency_seconds_count{model="tiny"}': 1,
        'inferflux_request_duration_seconds_count{model="unknown"}': 1000,
    }


def test_a_model_that_was_unknown_before_it_was_configured() -> None:
    metrics = Metrics()
    metrics.inter_token("tiny", 0.01)
    metrics.observe_models(lambda: [Model()])
    metrics.inter_token("tiny", 0.01)
    assert samples(metrics)['inferflux_inter_token_latency_seconds_count{model="tiny"}'] == 1


def test_engine_counters_never_fall(metrics: Metrics, model: Model) -> None:
    name = 'inferflux_generation_tokens_total{model="tiny"}'
    steps = 'inferflux_engine_steps_total{model="tiny"}'
    seen = []
    for generated, num_steps in ((10, 5), (25, 9), (0, 0), (4, 2), (4, 2), (1, 1)):
        model.stats = EngineStats(generation_tokens=generated, num_steps=num_steps, num_running=generated)
        values = samples(metrics)
        seen.append((values[name], values[steps]))
        assert values['inferflux_requests_running{model="tiny"}'] == generated
    assert seen == [(10, 5), (25, 9), (25, 9), (29, 11), (29, 11), (30, 12)]


def test_counters_by_position_never_fall(metrics: Metrics, model: Model) -> None:
    seen = []
    for drafts, drafted, accepted in (
        (0, [], []),
        (3, [3, 2], [2, 1]),
        (4, [4, 3, 1], [2, 1, 1]),
        (0, [], []),  # a new engine
        (1, [1, 1], [1, 0]),
        (1, [0, 1, 1, 1], [0, 0, 0, 0]),  # another, which has been faster than the scrapes
    ):
        model.stats = EngineStats(spec_drafts=drafts, spec_draft_tokens_per_pos=drafted, spec_accepted_tokens_per_pos=accepted)
        values = samples(metrics)
        seen.append(
            [
                [values.get(f'inferflux_spec_{kind}_tokens_per_pos_total{{model="tiny",position="{n}"}}') for n in range(4)]
                for kind in ("draft", "accepted")
            ]
            + [values['inferflux_spec_drafts_total{model="tiny"}']]
        )
    assert seen == [
        [[None] * 4, [None] * 4, 0],
        [[3, 2, None, None], [2, 1, None, None], 3],
        [[4, 3, 1, None], [2, 1, 1, None], 4],
        [[4, 3, 1, None], [2, 1, 1, None], 4],
        [[5, 4, 1, None], [3, 1, 1, None], 5],
        [[5, 5, 2, 1], [3, 1, 1, 0], 6],
    ]


def test_what_speculation_and_grammars_cost(metrics: Metrics, model: Model) -> None:
    model.stats = EngineStats(
        spec_draft_tokens=40, spec_accepted_tokens=30, forced_tokens=7, draft_seconds=0.25, mask_seconds=0.5
    )
    metrics.grammar_compiled(0.02, "ok")
    metrics.grammar_compiled(2.0, "timeout")
    values = samples(metrics)
    expected = {
        'spec_draft_tokens_total{model="tiny"}': 40,
        'spec_accepted_tokens_total{model="tiny"}': 30,
        'forced_tokens_total{model="tiny"}': 7,
        'draft_seconds_total{model="tiny"}': 0.25,
        'grammar_mask_seconds_total{model="tiny"}': 0.5,
        'grammar_compile_seconds_sum{outcome="ok"}': 0.02,
        'grammar_compile_seconds_bucket{le="0.025",outcome="ok"}': 1,
        'grammar_compile_seconds_count{outcome="timeout"}': 1,
    }
    assert {name: values[f"inferflux_{name}"] for name in expected} == expected


def test_thoughts_and_calls_of_a_request(metrics: Metrics) -> None:
    finish(metrics)
    assert not [name for name in samples(metrics) if name.startswith(("inferflux_reasoning_", "inferflux_tool_calls_"))]
    finish(metrics, num_reasoning=3, num_calls=2)
    finish(metrics, num_reasoning=1)
    values = samples(metrics)
    assert values['inferflux_reasoning_tokens_total{model="tiny"}'] == 4
    assert values['inferflux_tool_calls_total{model="tiny"}'] == 2


def test_models(metrics: Metrics, model: Model) -> None:
    model.restarts = 3
    values = samples(metrics)
    assert values['inferflux_model_loaded{model="tiny"}'] == 1
    assert values['inferflux_model_load_seconds{model="tiny"}'] == 2.5
    assert values['inferflux_engine_restarts_total{model="tiny"}'] == 3
    model.state, model.load_seconds = "loading", None
    values = samples(metrics)
    assert values['inferflux_model_loaded{model="tiny"}'] == 0
    assert 'inferflux_model_load_seconds{model="tiny"}' not in values
