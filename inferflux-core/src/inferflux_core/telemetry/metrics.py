"""The server's Prometheus metrics: what is counted as it happens, and the page that Prometheus reads."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from inferflux_core.telemetry.catalogue import SERVER, MetricSpec
from inferflux_core.telemetry.engine_collector import EngineCollector, ObservedModel
from inferflux_core.telemetry.version import VERSION

UNKNOWN_MODEL = "unknown"


class Metrics:
    """Metrics of one server, in a registry of its own. Call it from the event loop's thread."""

    def __init__(self) -> None:
        # The text format has no place for creation times, so they would come out as gauges of their own, one more series for
        # each we have. The switch is the library's, for the whole process.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library annotates some functions only
        self._registry = CollectorRegistry(auto_describe=True)
        self._models: Callable[[], Sequence[ObservedModel]] = tuple
        self._inter_token: dict[str, Histogram] = {}
        self._counters = {spec.name: self._counter(spec) for spec in SERVER if spec.type == "counter"}
        self._histograms = {spec.name: self._histogram(spec) for spec in SERVER if spec.type == "histogram"}
        self._gauges = {
            spec.name: Gauge(spec.name, spec.description, spec.labels, registry=self._registry)
            for spec in SERVER
            if spec.type == "gauge"
        }
        self._gauges["inferflux_build_info"].labels(version=VERSION, python_version=platform.python_version()).set(1)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(EngineCollector(lambda: self._models()))

    def observe_models(self, models: Callable[[], Sequence[ObservedModel]]) -> None:
        """Say where the models are; their names become label values and their engines' reports metrics.

        Args:
            models: returns all configured models; called at each scrape, so it must be cheap.
        """
        self._models = models

    def request_finished(
        self,
        endpoint: str,
        model: str,
        status: int,
        finish_reason: str,
        *,
        duration: float,
        ttft: float | None,
        queue_time: float | None,
        num_generated: int,
        decode_time: float | None,
        num_reasoning: int = 0,
        num_calls: int = 0,
    ) -> None:
        """Count a request that the pipeline took, however it ended.

        Args:
            endpoint: route template.
            model: canonical name of the model.
            status: HTTP status; 499 when the client left.
            finish_reason: OpenAI's, or "" where nothing was generated.
            duration: seconds since arrival.
            ttft: seconds from arrival to the first token; None if there was none.
            queue_time: seconds from arrival until the engine first scheduled it; None if it never did.
            num_generated: tokens drawn, all choices together.
            decode_time: seconds from the first token to the last; None if there was none.
            num_reasoning: how many of the tokens were thoughts.
            num_calls: calls of tools that were begun, all choices together.
        """
        name = self._model_label(model)
        self._count("inferflux_requests_total", endpoint, str(status), finish_reason)
        if num_reasoning:
            self._counters["inferflux_reasoning_tokens_total"].labels(name).inc(num_reasoning)
        if num_calls:
            self._counters["inferflux_tool_calls_total"].labels(name).inc(num_calls)
        if status == 200:
            self._observe("inferflux_request_duration_seconds", name, duration)
        if queue_time is not None:
            self._observe("inferflux_request_queue_time_seconds", name, queue_time)
        if ttft is not None:
            self._observe("inferflux_time_to_first_token_seconds", name, ttft)
            if queue_time is not None:
                self._observe("inferflux_request_prefill_time_seconds", name, max(0.0, ttft - queue_time))
        if decode_time is not None:
            self._observe("inferflux_request_decode_time_seconds", name, decode_time)
            if num_generated > 1:
                per_token = decode_time / (num_generated - 1)
                self._observe("inferflux_request_time_per_output_token_seconds", name, per_token)

    def request_refused(self, endpoint: str, status: int, reason: str) -> None:
        """Count a request that failed before the pipeline took it: not JSON, no such URL, an invalid field.

        Args:
            endpoint: route template.
            reason: error code, or error type where there is no code.
        """
        self._count("inferflux_requests_total", endpoint, str(status), "")
        self.error(reason)

    def inter_token(self, model: str, seconds: float) -> None:
        """Observe the time between two tokens of a choice. Hot: called for each step of each choice."""
        child = self._inter_token.get(model)
        if child is None:
            label = self._model_label(model)
            child = self._histograms["inferflux_inter_token_latency_seconds"].labels(label)
            if label == model:  # never remember names that are not configured: there is no end of them
                self._inter_token[model] = child
        child.observe(seconds)

    def grammar_compiled(self, seconds: float, outcome: str) -> None:
        """Observe how long it took to check a grammar that no cache knew, and what came of it: `ok`, `refused`, `timeout` or
        `busy`."""
        self._histograms["inferflux_grammar_compile_seconds"].labels(outcome).observe(seconds)

    def error(self, reason: str) -> None:
        """Count a failed request by its error code."""
        self._count("inferflux_errors_total", reason)

    def queue_rejection(self, reason: str) -> None:
        """Count a request refused because a queue was full."""
        self._count("inferflux_queue_rejections_total", reason)

    def disconnect(self) -> None:
        """Count a client that left before its answer was complete."""
        self._counters["inferflux_client_disconnects_total"].inc()

    def auth_failure(self, reason: str) -> None:
        """Count a credential that was refused, by a short fixed reason."""
        self._count("inferflux_auth_failures_total", reason)

    def auth_event(self, provider: str, event: str) -> None:
        """Count something an auth provider did, such as fetching keys."""
        self._count("inferflux_auth_events_total", provider, event)

    def policy_decision(self, engine: str, allowed: bool, seconds: float) -> None:
        """Count a decision of a policy engine and how long it took."""
        self._count("inferflux_policy_decisions_total", engine, "allow" if allowed else "deny")
        self._histograms["inferflux_policy_latency_seconds"].labels(engine).observe(seconds)

    def policy_reload(self, result: str) -> None:
        """Count a change of the policy file that was taken or rejected."""
        self._count("inferflux_policy_reloads_total", result)

    def rate_limited(self, kind: str) -> None:
        """Count a request refused because a quota was used up."""
        self._count("inferflux_rate_limited_total", kind)

    def limiter_event(self, event: str) -> None:
        """Count trouble with the store of the limits and what was done about it."""
        self._count("inferflux_limiter_events_total", event)

    def audit(self, event: str) -> None:
        """Count what became of an audit record: `records`, `write_failures`, `dropped` or `suppressed`."""
        self._counters[f"inferflux_audit_{event}_total"].inc()

    def observe_audit(self, head: Callable[[], int]) -> None:
        """Say where the sequence number of the last audit record is; read at each scrape."""
        self._gauges["inferflux_audit_head"].set_function(head)

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics page and its content type, in the format that the `Accept` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _count(self, name: str, *labels: str) -> None:
        self._counters[name].labels(*labels).inc()

    def _observe(self, name: str, model: str, value: float) -> None:
        self._histograms[name].labels(model).observe(value)

    def _model_label(self, model: str) -> str:
        return model if any(model == known.name for known in self._models()) else UNKNOWN_MODEL

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.description, spec.labels, registry=self._registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(spec.name, spec.description, spec.labels, buckets=spec.buckets, registry=self._registry)
