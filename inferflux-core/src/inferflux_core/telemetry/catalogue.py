"""Every Prometheus metric of this server. The metrics are made from this list and the reference page is checked against it.

Base units are seconds, tokens and ratios from 0 to 1. `model` is only ever a configured name or `unknown`, `endpoint` a route
template, `status` an HTTP status: no label value comes from a client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
POLICY_BUCKETS = (0.000001, 0.00001, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1)
COMPILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: as scraped; counters end in `_total`.
        type: Prometheus type.
        labels: label names.
        description: help text, with the unit.
        buckets: upper bounds of a histogram.
        stat: field of `EngineStats` that is read at each scrape; None for metrics that the server counts itself. A field that
            is a list has the label `position`, its index.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    stat: str | None = None


def _engine(name: str, kind: Literal["counter", "gauge"], stat: str, description: str) -> MetricSpec:
    return MetricSpec(name=f"inferflux_{name}", type=kind, labels=("model",), description=description, stat=stat)


def _per_position(name: str, stat: str, description: str) -> MetricSpec:
    labels = ("model", "position")
    return MetricSpec(name=f"inferflux_{name}", type="counter", labels=labels, description=description, stat=stat)


def _histogram(name: str, buckets: tuple[float, ...], description: str) -> MetricSpec:
    return MetricSpec(name=f"inferflux_{name}", type="histogram", labels=("model",), description=description, buckets=buckets)


ENGINE: tuple[MetricSpec, ...] = (
    _engine("requests_running", "gauge", "num_running", "Sequences that are being computed."),
    _engine("requests_waiting", "gauge", "num_waiting", "Sequences that wait for a slot."),
    _engine("kv_cache_usage_ratio", "gauge", "kv_cache_usage", "Share of the KV cache held by running sequences."),
    _engine("preemptions_total", "counter", "num_preemptions", "Sequences that gave up their KV cache to make room."),
    _engine("prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens of started requests."),
    _engine("generation_tokens_total", "counter", "generation_tokens", "Tokens drawn."),
    _engine("cached_prompt_tokens_total", "counter", "cached_prompt_tokens", "Prompt tokens from the prefix cache."),
    _engine("recomputed_prompt_tokens_total", "counter", "recomputed_prompt_tokens", "Tokens computed again after preemption."),
    _engine("prefix_cache_queries_total", "counter", "prefix_cache_queries", "Tokens looked up in the prefix cache."),
    _engine("prefix_cache_hits_total", "counter", "prefix_cache_hits", "Tokens found in the prefix cache."),
    _engine("engine_steps_total", "counter", "num_steps", "Steps of the engine."),
    _engine("engine_step_tokens_total", "counter", "step_tokens", "Tokens computed in all steps, prompt and output."),
    _engine("engine_schedule_seconds_total", "counter", "schedule_seconds", "Seconds spent planning steps."),
    _engine("engine_model_seconds_total", "counter", "model_seconds", "Seconds spent in the model's forward passes."),
    _engine("spec_drafts_total", "counter", "spec_drafts", "Drafts of speculative decoding that were verified."),
    _engine("spec_draft_tokens_total", "counter", "spec_draft_tokens", "Draft tokens that were verified."),
    _engine("spec_accepted_tokens_total", "counter", "spec_accepted_tokens", "Draft tokens that held."),
    _per_position(
        "spec_draft_tokens_per_pos_total",
        "spec_draft_tokens_per_pos",
        "Draft tokens that were verified, by their position in the draft from 0.",
    ),
    _per_position(
        "spec_accepted_tokens_per_pos_total",
        "spec_accepted_tokens_per_pos",
        "Draft tokens that held, by their position in the draft from 0.",
    ),
    _engine("draft_seconds_total", "counter", "draft_seconds", "Seconds spent proposing draft tokens."),
    _engine("forced_tokens_total", "counter", "forced_tokens", "Tokens that a grammar left no choice about."),
    _engine("grammar_mask_seconds_total", "counter", "mask_seconds", "Seconds steps waited for the masks of grammars."),
)

MODEL: tuple[MetricSpec, ...] = (
    MetricSpec(name="inferflux_model_loaded", type="gauge", labels=("model",), description="1 if the model is ready."),
    MetricSpec(
        name="inferflux_model_load_seconds",
        type="gauge",
        labels=("model",),
        description="Seconds the last load took; absent until the model was loaded once.",
    ),
    MetricSpec(
        name="inferflux_engine_restarts_total",
        type="counter",
        labels=("model",),
        description="Engine processes that were replaced after a crash or a hang.",
    ),
)

SERVER: tuple[MetricSpec, ...] = (
    MetricSpec(
        name="inferflux_requests_total",
        type="counter",
        labels=("endpoint", "status", "finish_reason"),
        description="Requests that ended; finish_reason is empty where nothing was generated.",
    ),
    _histogram("time_to_first_token_seconds", TTFT_BUCKETS, "Seconds from arrival to the first token."),
    _histogram("inter_token_latency_seconds", TOKEN_BUCKETS, "Seconds between two tokens of a choice."),
    _histogram("request_time_per_output_token_seconds", TOKEN_BUCKETS, "Mean seconds per token of a request after its first."),
    _histogram("request_duration_seconds", REQUEST_BUCKETS, "Seconds from arrival to the end of a successful request."),
    _histogram("request_queue_time_seconds", REQUEST_BUCKETS, "Seconds a request waited to be scheduled."),
    _histogram("request_prefill_time_seconds", REQUEST_BUCKETS, "Seconds from being scheduled to the first token."),
    _histogram("request_decode_time_seconds", REQUEST_BUCKETS, "Seconds from the first token to the last."),
    MetricSpec(
        name="inferflux_reasoning_tokens_total",
        type="counter",
        labels=("model",),
        description="Tokens drawn that were thoughts.",
    ),
    MetricSpec(
        name="inferflux_tool_calls_total",
        type="counter",
        labels=("model",),
        description="Calls of tools that models began to write.",
    ),
    MetricSpec(
        name="inferflux_grammar_compile_seconds",
        type="histogram",
        labels=("outcome",),
        buckets=COMPILE_BUCKETS,
        description="Seconds to check a grammar that was not known yet; outcome is `ok`, `refused`, `timeout` or `busy`.",
    ),
    MetricSpec(name="inferflux_errors_total", type="counter", labels=("reason",), description="Failed requests by error code."),
    MetricSpec(
        name="inferflux_client_disconnects_total",
        type="counter",
        description="Requests whose client left before the answer was complete.",
    ),
    MetricSpec(
        name="inferflux_queue_rejections_total",
        type="counter",
        labels=("reason",),
        description="Requests refused because a queue was full.",
    ),
    MetricSpec(
        name="inferflux_auth_failures_total",
        type="counter",
        labels=("reason",),
        description="Credentials that were refused.",
    ),
    MetricSpec(
        name="inferflux_auth_events_total",
        type="counter",
        labels=("provider", "event"),
        description="What auth providers did, such as fetching keys.",
    ),
    MetricSpec(
        name="inferflux_policy_decisions_total",
        type="counter",
        labels=("engine", "effect"),
        description="Decisions of a policy engine, those from its cache too; effect is `allow` or `deny`.",
    ),
    MetricSpec(
        name="inferflux_policy_latency_seconds",
        type="histogram",
        labels=("engine",),
        buckets=POLICY_BUCKETS,
        description="Seconds a policy decision took.",
    ),
    MetricSpec(
        name="inferflux_policy_reloads_total",
        type="counter",
        labels=("result",),
        description="Changes of the policy file; result is `reloaded` or `rejected`.",
    ),
    MetricSpec(
        name="inferflux_rate_limited_total",
        type="counter",
        labels=("kind",),
        description="Requests refused because a quota was used up.",
    ),
    MetricSpec(
        name="inferflux_limiter_events_total",
        type="counter",
        labels=("event",),
        description="Trouble with the store of the limits, and what was done about it.",
    ),
    MetricSpec(name="inferflux_audit_records_total", type="counter", description="Audit records written."),
    MetricSpec(
        name="inferflux_audit_write_failures_total", type="counter", description="Attempts to write audit records that failed."
    ),
    MetricSpec(name="inferflux_audit_dropped_total", type="counter", description="Audit records dropped: the queue was full."),
    MetricSpec(
        name="inferflux_audit_suppressed_total",
        type="counter",
        description="Audit records of requests without a credential that were counted together.",
    ),
    MetricSpec(
        name="inferflux_audit_head",
        type="gauge",
        description="Sequence number of the last audit record; kept elsewhere, it shows a log that was cut off.",
    ),
    MetricSpec(
        name="inferflux_build_info",
        type="gauge",
        labels=("version", "python_version"),
        description="Always 1; the labels say what runs.",
    ),
)

CATALOGUE: tuple[MetricSpec, ...] = SERVER + MODEL + ENGINE
