"""From a model's settings to what its engine is told: how it speculates, and what of the settings cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferflux_core.config import served_name
from inferflux_core.engine.client import EngineClient
from inferflux_core.engine.engine_spec import DraftSpec, EngineSpec, SpeculativeSpec
from inferflux_core.engine.inprocess import InProcessEngineClient
from inferflux_core.errors import ConfigError
from inferflux_core.interfaces import ModelFiles
from inferflux_core.models.model_loader import ModelLoader
from inferflux_core.models.served_model import ServedModel
from inferflux_core.plugins import load_plugins
from inferflux_core.settings import Settings


class EnoughSeen(ConfigError):
    """The engine would start now."""


async def loaded(settings: dict[str, Any]) -> tuple[list[EngineSpec], ServedModel]:
    """What an engine would be made from; nothing if it does not come so far."""
    specs: list[EngineSpec] = []

    def factory(name: str, spec: EngineSpec) -> EngineClient:
        specs.append(spec)
        raise EnoughSeen("enough")

    configured = Settings.model_validate(settings)
    model = ServedModel(served_name(configured.models[0]), configured.models[0])
    await ModelLoader(configured, load_plugins(), factory).load(model, show_progress=False)
    return specs, model


def fake(**settings: Any) -> dict[str, Any]:
    return {"models": [{"source": "fake", **settings}]}


async def test_nothing_is_guessed_unless_it_is_configured() -> None:
    (spec,), _ = await loaded(fake())
    assert spec.speculative == SpeculativeSpec()
    assert spec.structured_output is True
    (spec,), _ = await loaded({**fake(), "structured_output": {"enabled": False}})
    assert spec.structured_output is False


async def test_a_model_has_its_own_way_to_guess_or_that_of_all() -> None:
    everybody = {"speculative": {"method": "ngram", "num_speculative_tokens": 5}}
    (spec,), _ = await loaded({**fake(), "engine": everybody})
    assert (spec.speculative.method, spec.speculative.num_speculative_tokens, spec.speculative.draft) == ("ngram", 5, None)
    (spec,), _ = await loaded({**fake(speculative={}), "engine": everybody})
    assert spec.speculative == SpeculativeSpec()


async def test_a_draft_model_is_found_as_the_model_is() -> None:
    chosen = {"method": "draft_model", "model": "fake:small", "backend_settings": {"num_blocks": 7}}
    (spec,), _ = await loaded({**fake(speculative=chosen, backend="fake"), "backends": {"fake": {"block_size": 8}}})
    draft = spec.speculative.draft
    assert isinstance(draft, DraftSpec)
    assert draft.files == ModelFiles(ref="fake:small", format="fake", paths=())
    assert (draft.backend, draft.backend_settings["num_blocks"], draft.backend_settings["block_size"]) == ("fake", 7, 8)
    assert (spec.backend_settings["num_blocks"], spec.backend_settings["block_size"]) == (4096, 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"speculative": {"method": "draft_model"}}, "needs speculative.model"),
        ({"speculative": {"model": "fake:small"}}, "of use only with"),
        ({"speculative": {"method": "ngram", "model": "fake:small"}}, "not 'ngram'"),
        ({"speculative": {"method": "oracle"}}, "oracle"),
        ({"speculative": {"method": "ngram", "settings": {"nonsense": 1}}}, "nonsense"),
        ({"speculative": {"method": "draft_model", "model": "nowhere"}}, "nowhere"),
        ({"speculative": {"method": "draft_model", "model": "fake:small", "backend": "llamacpp"}}, "llamacpp"),
        ({"speculative": {"method": "draft_model", "model": "fake:small", "backend_settings": {"x": 1}}}, "x"),
    ],
    ids=str,
)
async def test_a_way_to_guess_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    specs, model = await loaded(fake(**settings))
    assert specs == []
    assert model.state == "failed"
    assert reason in (model.last_error or "")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tool_parser": "smoke_signs"}, "'smoke_signs'"),
        ({"reasoning_parser": "dreams"}, "'dreams'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs cannot set messages"),
    ],
    ids=str,
)
async def test_a_way_to_talk_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    configured = Settings.model_validate(fake(**settings))
    model = ServedModel("m", configured.models[0])
    registry = load_plugins()

    def engine(name: str, spec: EngineSpec) -> EngineClient:
        return InProcessEngineClient(name, spec, configured.engine, registry)

    await ModelLoader(configured, registry, engine).load(model, show_progress=False)
    assert model.state == "failed"
    assert reason in (model.last_error or "")


async def test_how_a_model_talks_is_told_by_its_template_and_shown_with_its_details(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}{{ '<think>' if enable_thinking }}{# </think> #}")
    configured = Settings.model_validate(fake(chat_template=str(template), chat_template_kwargs={"enable_thinking": True}))
    model = ServedModel("m", configured.models[0])
    registry = load_plugins()

    def engine(name: str, spec: EngineSpec) -> EngineClient:
        return InProcessEngineClient(name, spec, configured.engine, registry)

    await ModelLoader(configured, registry, engine).load(model, show_progress=False)
    try:
        assert model.chat is not None
        assert model.chat.kwargs == {"enable_thinking": True}
        assert (model.details["tool_parser"], model.details["reasoning_parser"]) == ("hermes", "think")
    finally:
        await model.end()
    assert "tool_parser" not in model.details
