"""Probes, the status page, the metrics page."""

from __future__ import annotations

import pytest

from core.serving.scripted import FakeModel, FakeModels, stand
from inferflux_core.engine.types import EngineStats
from inferflux_core.settings import MetricsSettings, Settings
from inferflux_core.telemetry.version import VERSION


async def test_livez_whatever_the_models_do() -> None:
    s = stand(models=FakeModels([FakeModel(state="failed")]))
    s.state.draining = True
    async with s.client() as client:
        response = await client.get("/livez")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize(
    ("default", "other", "draining", "status"),
    [
        (FakeModel(), None, False, "ready"),
        (FakeModel(), FakeModel("other", is_default=False, state="failed"), False, "ready"),
        (FakeModel(state="loading"), None, False, "not_ready"),
        (FakeModel(state="restarting"), FakeModel("other", is_default=False), False, "not_ready"),
        (FakeModel(making_progress=False), None, False, "not_ready"),
        (FakeModel(), None, True, "draining"),
    ],
)
async def test_readyz(default: FakeModel, other: FakeModel | None, draining: bool, status: str) -> None:
    views = [default] if other is None else [default, other]
    s = stand(models=FakeModels(views))
    s.state.draining = draining
    async with s.client() as client:
        response = await client.get("/readyz")
    assert response.status_code == (200 if status == "ready" else 503)
    assert response.headers.get("retry-after") == (None if status == "ready" else "1")
    assert response.json() == {
        "status": status,
        "models": [
            {"name": v.name, "state": v.state, "default": v.is_default, "making_progress": v.making_progress} for v in views
        ],
    }


async def test_healthz() -> None:
    stats = EngineStats(num_running=3, num_waiting=2, kv_cache_usage=0.5)
    views = [FakeModel(stats=stats), FakeModel("b", is_default=False, state="restarting", restarts=4, last_error="died")]
    s = stand(models=FakeModels(views))
    async with s.client() as client:
        response = await client.get("/healthz")
    body = response.json()
    assert response.status_code == 200
    assert 0 <= body.pop("uptime_s") < 60
    assert body == {
        "status": "degraded",
        "version": VERSION,
        "models": [
            {
                "name": "tiny",
                "state": "ready",
                "requests_running": 3,
                "requests_waiting": 2,
                "kv_cache_usage_ratio": 0.5,
                "restarts": 0,
                "last_error": None,
                "speculation": None,
            },
            {
                "name": "b",
                "state": "restarting",
                "requests_running": 0,
                "requests_waiting": 0,
                "kv_cache_usage_ratio": 0.0,
                "restarts": 4,
                "last_error": "died",
                "speculation": None,
            },
        ],
        "audit_log": "off",
    }
    views.pop()
    async with s.client() as client:
        assert (await client.get("/healthz")).json()["status"] == "ok"
        s.state.draining = True
        assert (await client.get("/healthz")).json()["status"] == "draining"


async def test_healthz_tells_what_speculation_brought() -> None:
    stats = EngineStats(
        spec_drafts=8,
        spec_draft_tokens=24,
        spec_accepted_tokens=16,
        spec_draft_tokens_per_pos=[8, 8, 8],
        spec_accepted_tokens_per_pos=[8, 5, 3],
    )
    ngram, silent = FakeModel(stats=stats), FakeModel("b", is_default=False)
    for model in (ngram, silent):
        model.details = {"speculation": "ngram"}
    async with stand(models=FakeModels([ngram, silent])).client() as client:
        shown = [model["speculation"] for model in (await client.get("/healthz")).json()["models"]]
    assert shown == [
        {
            "method": "ngram",
            "drafts": 8,
            "draft_tokens": 24,
            "accepted_tokens": 16,
            "acceptance_ratio": 0.6667,
            "mean_accepted_tokens": 2.0,
            "draft_tokens_per_position": [8, 8, 8],
            "accepted_tokens_per_position": [8, 5, 3],
        },
        {
            "method": "ngram",
            "drafts": 0,
            "draft_tokens": 0,
            "accepted_tokens": 0,
            "acceptance_ratio": None,
            "mean_accepted_tokens": None,
            "draft_tokens_per_position": [],
            "accepted_tokens_per_position": [],
        },
    ]


async def test_metrics_page() -> None:
    async with stand().client() as client:
        response = await client.get("/metrics")
        modern = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'inferflux_model_loaded{model="tiny"} 1.0\n' in response.text
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_metrics_page_can_be_turned_off() -> None:
    s = stand(settings=Settings(metrics=MetricsSettings(enabled=False)))
    async with s.client() as client:
        assert (await client.get("/metrics")).status_code == 404
