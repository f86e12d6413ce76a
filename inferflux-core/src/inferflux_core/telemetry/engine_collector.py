"""Metrics of the models and their engines, read from their last reports when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inferflux_core.engine.types import EngineStats
from inferflux_core.telemetry.catalogue import ENGINE, MODEL, MetricSpec

_COUNTED = tuple(spec.stat for spec in ENGINE if spec.type == "counter" and spec.stat is not None)


class ObservedModel(Protocol):
    """What the metrics want to know of a model; see `serving.services.ModelView`."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def restarts(self) -> int: ...
    @property
    def load_seconds(self) -> float | None: ...
    @property
    def stats(self) -> EngineStats: ...


class _Totals:
    """Counters of one model over all its engine processes.

    A new engine process counts from zero. What the dead one had counted is kept as an offset, so that the exported
    counters never fall. The sign of a new process is a counter that fell since the last look. A counter by position is a
    list, which may grow from one look to the next.
    """

    def __init__(self) -> None:
        self._offset: dict[str, list[float]] = {name: [] for name in _COUNTED}
        self._last: dict[str, list[float]] = {name: [] for name in _COUNTED}

    def update(self, stats: EngineStats) -> dict[str, list[float]]:
        """What each counter has come to; one number, or one a position."""
        current = {name: _numbers(getattr(stats, name)) for name in _COUNTED}
        if any(_fell(current[name], self._last[name]) for name in _COUNTED):
            for name in _COUNTED:
                self._offset[name] = _sum(self._offset[name], self._last[name])
        self._last = current
        return {name: _sum(self._offset[name], current[name]) for name in _COUNTED}


class EngineCollector(Collector):
    """Collects `ENGINE` and `MODEL` of the catalogue, labelled with the model's configured name."""

    def __init__(self, models: Callable[[], Sequence[ObservedModel]]) -> None:
        self._models = models
        self._totals: dict[str, _Totals] = {}

    def describe(self) -> Iterable[Metric]:
        """Names only, so that registering asks no model for anything."""
        return [_family(spec) for spec in (*MODEL, *ENGINE)]

    def collect(self) -> Iterable[Metric]:
        """One family a metric, one sample a model."""
        models = [(model, model.stats) for model in self._models()]
        totals = {model.name: self._totals.setdefault(model.name, _Totals()).update(stats) for model, stats in models}
        families = []
        for spec in ENGINE:
            assert spec.stat is not None
            family = _family(spec)
            for model, stats in models:
                if spec.type == "gauge":
                    family.add_metric([model.name], float(getattr(stats, spec.stat)))
                    continue
                for position, value in enumerate(totals[model.name][spec.stat]):
                    family.add_metric([model.name, str(position)] if "position" in spec.labels else [model.name], value)
            families.append(family)
        return families + self._model_families([model for model, _ in models])

    @staticmethod
    def _model_families(models: Sequence[ObservedModel]) -> list[CounterMetricFamily | GaugeMetricFamily]:
        loaded, load_seconds, restarts = (_family(spec) for spec in MODEL)
        for model in models:
            loaded.add_metric([model.name], float(model.state == "ready"))
            restarts.add_metric([model.name], model.restarts)
            if model.load_seconds is not None:
                load_seconds.add_metric([model.name], model.load_seconds)
        return [loaded, load_seconds, restarts]


def _family(spec: MetricSpec) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if spec.type == "counter" else GaugeMetricFamily
    return family(spec.name, spec.description, labels=spec.labels)


def _numbers(value: float | list[int]) -> list[float]:
    return [float(number) for number in value] if isinstance(value, list) else [float(value)]


def _fell(current: list[float], last: list[float]) -> bool:
    return any(now < before for now, before in zip_longest(current, last, fillvalue=0.0))


def _sum(one: list[float], other: list[float]) -> list[float]:
    return [left + right for left, right in zip_longest(one, other, fillvalue=0.0)]
