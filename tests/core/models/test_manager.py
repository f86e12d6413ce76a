"""Models that come and go while the server runs: loading, unloading, the default one, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from inferflux_core.engine.client import EngineClient, EngineState, OutputStream
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.inprocess import InProcessEngineClient
from inferflux_core.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    ModelFileError,
    ModelLoadingError,
    ModelNotFoundError,
    OverloadedError,
    PluginError,
    RequestTimeoutError,
)
from inferflux_core.interfaces import ModelFiles, ModelSource, Registration, SourceContext
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.models.routing import Routing
from inferflux_core.plugins import Distribution, PluginRegistry, load_plugins
from inferflux_core.settings import ModelSettings, Settings
from inferflux_core.testing.driver import make_request

DEADLINE = 20.0


class SlowSource(ModelSource):
    """`slow`: a source that a test holds back, as a download does; `slow:broken` then fails."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def matches(self, ref: str) -> bool:
        return ref.startswith("slow")

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        self.asked.set()
        assert self.go_on.wait(DEADLINE)
        if ref == "slow:broken":
            raise ModelFileError(f"{ref!r} is damaged")
        if ref == "slow:bug":
            raise ZeroDivisionError
        return ModelFiles(ref=ref, format="fake", paths=())


@pytest.fixture
def slow() -> Iterator[SlowSource]:
    source = SlowSource()
    yield source
    source.go_on.set()


def registry_with(source: SlowSource) -> PluginRegistry:
    registry = load_plugins()
    registry.add("model source", Registration(name="slow", factory=lambda _: source), Distribution("slow", "1"))
    return registry


@asynccontextmanager
async def managing(source: SlowSource, *sources: str, load: bool = True, **settings: object) -> AsyncIterator[ModelManager]:
    """A manager with engines in threads; `sources` are the models of the configuration, `fake` if there are none."""
    registry = registry_with(source)
    models = [{"source": ref, "aliases": [f"{ref}-alias"]} for ref in sources or ("fake",)]
    # Steps take a while, so that what a test leaves running does not finish by itself.
    configured = Settings.model_validate({"models": models, "backends": {"fake": {"step_ms": 5}}, **settings})

    def engine(name: str, spec: EngineSpec) -> EngineClient:
        return InProcessEngineClient(name, spec, configured.engine, registry)

    manager = ModelManager(configured, registry, engine)
    try:
        if load:
            await manager.load()
        yield manager
    finally:
        source.go_on.set()
        await manager.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  # nothing tells when
            await asyncio.sleep(0.005)


def states(manager: ModelManager) -> dict[str, str]:
    return {model.name: model.state for model in manager.list()}


def added(manager: ModelManager, source: str, **settings: object) -> ServedModel:
    return manager.add(ModelSettings.model_validate({"source": source, **settings}))


def running(model: ServedModel) -> OutputStream:
    """A request to the model that ends only when its engine does."""
    stream = OutputStream()
    model.ready_engine().submit([make_request([1, 2, 3], max_tokens=4000, ignore_eos=True)], stream)
    return stream


# --- loading ----------------------------------------------------------------------------------------------------------


async def test_a_model_is_listed_while_it_loads_and_takes_requests_when_it_is_ready(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        before = manager.list()
        model = added(manager, "slow", name="late", aliases=["l"])
        assert states(manager) == {"fake": "ready", "late": "loading"}
        assert [m.name for m in before] == ["fake"]  # a list that was handed out does not change
        with pytest.raises(ModelLoadingError, match="'late' is not ready"):
            manager.get("late").ready_engine()
        assert running(manager.get("fake")) is not None  # the others go on
        slow.go_on.set()
        await manager.loaded(model)
        assert states(manager) == {"fake": "ready", "late": "ready"}
        assert manager.get("l") is model
        assert (manager.get(None).name, model.is_default) == ("fake", False)
        await manager.loaded(model)  # nothing to wait for


async def test_a_model_that_asks_to_be_the_default_becomes_it_when_it_is_ready(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        model = added(manager, "slow", default=True)
        assert manager.get(None).name == "fake"
        slow.go_on.set()
        await manager.loaded(model)
        assert manager.get(None) is model
        assert [m.is_default for m in manager.list()] == [False, True]


@pytest.mark.parametrize(("source", "error"), [("slow:broken", "damaged"), ("slow:bug", "unexpected error")])
async def test_a_model_that_fails_stays_as_failed_until_it_is_loaded_again(slow: SlowSource, source: str, error: str) -> None:
    slow.go_on.set()
    async with managing(slow) as manager:
        model = added(manager, source, name="m", default=True)
        await manager.loaded(model)
        assert states(manager) == {"fake": "ready", "m": "failed"}
        assert error in (model.last_error or "")
        assert manager.get(None).name == "fake"
        again = added(manager, "fake:2", name="m")
        assert states(manager) == {"fake": "ready", "m": "loading"}
        await manager.loaded(again)
        assert manager.get("m") is again
        assert again.state == "ready"


async def test_a_failed_default_is_replaced_by_a_default(slow: SlowSource) -> None:
    slow.go_on.set()
    async with managing(slow, "slow:broken", "fake") as manager:
        assert (manager.get(None).name, manager.get(None).state) == ("slow:broken", "failed")
        model = added(manager, "fake:2", name="slow:broken")
        assert manager.get(None) is model


async def test_no_name_is_taken_twice(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        for settings in ({"name": "fake"}, {"name": "fake-alias"}, {"name": "x", "aliases": ["fake"]}):
            with pytest.raises(ConflictError, match="belongs to the model 'fake' \\(ready\\)"):
                added(manager, "fake:2", **settings)
        assert states(manager) == {"fake": "ready"}


async def test_a_failed_model_is_not_replaced_through_its_alias(slow: SlowSource) -> None:
    slow.go_on.set()
    async with managing(slow, "fake", "slow:broken") as manager:
        with pytest.raises(ConflictError, match="'slow:broken-alias' belongs to the model 'slow:broken' \\(failed\\)"):
            added(manager, "fake:2", name="slow:broken-alias")


async def test_a_backend_that_is_not_there_or_refuses_its_settings(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        with pytest.raises(PluginError, match="nobody"):
            added(manager, "fake:2", backend="nobody")
        with pytest.raises(PluginError, match="layout"):
            added(manager, "fake:2", backend="fake", backend_settings={"layout": "round"})
        assert states(manager) == {"fake": "ready"}


@pytest.mark.parametrize("path", ["/models/a.gguf", "./a", "~/a", "a.gguf"])
async def test_paths_need_model_roots(slow: SlowSource, path: str) -> None:
    async with managing(slow) as manager:
        with pytest.raises(ModelFileError, match="set model_roots"):
            added(manager, path)


async def test_paths_outside_model_roots_are_refused_through_links_too(slow: SlowSource, tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.gguf").write_bytes(b"GGUF")
    (inside / "link.gguf").symlink_to(outside / "secret.gguf")
    async with managing(slow, model_roots=[str(inside)]) as manager:
        for path in (outside / "secret.gguf", inside / ".." / "out" / "secret.gguf", inside / "link.gguf", outside / "none"):
            model = added(manager, str(path), name=path.name)
            await manager.loaded(model)
            assert model.state == "failed"
            assert "is outside the folders that models may come from" in (model.last_error or "")


async def test_the_hub_is_not_asked_offline(slow: SlowSource) -> None:
    async with managing(slow, hub={"offline": True}) as manager:
        with pytest.raises(ModelFileError, match="is on; load it from a path"):
            added(manager, "hf:owner/repo")


async def test_a_server_without_any_model_does_not_start(slow: SlowSource) -> None:
    slow.go_on.set()
    async with managing(slow, "slow:broken", load=False) as manager:
        with pytest.raises(ConfigError, match="damaged"):
            await manager.load()


# --- unloading --------------------------------------------------------------------------------------------------------


async def test_an_unloaded_model_is_gone(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        engine = manager.get("fake:2").ready_engine()
        assert (await manager.remove("fake:2-alias", drain_s=0)).name == "fake:2"
        assert states(manager) == {"fake": "ready"}
        assert engine.state is EngineState.STOPPED
        for name in ("fake:2", "fake:2-alias"):
            with pytest.raises(ModelNotFoundError):
                manager.get(name)
        with pytest.raises(ModelNotFoundError):
            await manager.remove("fake:2", drain_s=0)
        await manager.loaded(added(manager, "fake:2"))
        assert states(manager) == {"fake": "ready", "fake:2": "ready"}


async def test_running_requests_finish_before_the_engine_ends_and_new_ones_are_refused(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        model = manager.get("fake:2")
        engine, stream = model.ready_engine(), OutputStream()
        request = make_request([1, 2, 3], max_tokens=4000, ignore_eos=True)
        engine.submit([request], stream)
        unloading = asyncio.create_task(manager.remove("fake:2", drain_s=DEADLINE))
        await until(lambda: model.unloading)
        assert states(manager) == {"fake": "ready", "fake:2": "unloading"}
        with pytest.raises(ModelLoadingError, match="unloading"):
            manager.get("fake:2").ready_engine()
        with pytest.raises(ConflictError, match="unloading"):
            added(manager, "fake:2")
        await stream.get()
        assert not unloading.done()
        assert (await manager.remove("fake:2", drain_s=0)) is model  # a second time changes nothing
        assert manager.get("fake:2") is model
        engine.abort([request.request_id])  # the last request is over
        await unloading
        assert states(manager) == {"fake": "ready"}
        assert engine.state is EngineState.STOPPED


async def test_requests_that_take_too_long_fail_with_503(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        stream = running(manager.get("fake:2"))
        await stream.get()
        await manager.remove("fake:2", drain_s=0)

        with pytest.raises(ModelLoadingError, match="was unloaded"):  # noqa: PT012  # after what had arrived
            async with asyncio.timeout(DEADLINE):
                while True:
                    await stream.get()


async def test_unloading_goes_on_when_nobody_waits_for_it(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        stream = running(manager.get("fake:2"))
        await stream.get()
        unloading = asyncio.create_task(manager.remove("fake:2", drain_s=0.1))
        await until(lambda: manager.get("fake:2").unloading)
        unloading.cancel()
        await until(lambda: states(manager) == {"fake": "ready"})


async def test_the_default_model_cannot_be_unloaded(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        with pytest.raises(ConflictError, match="'fake' is the default model"):
            await manager.remove("fake", drain_s=0)
        manager.set_default("fake:2-alias")
        await manager.remove("fake", drain_s=0)
        assert (manager.get(None).name, states(manager)) == ("fake:2", {"fake:2": "ready"})


async def test_a_model_that_is_being_fetched_can_be_unloaded(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        model = added(manager, "slow", default=True)
        await until(slow.asked.is_set)
        await manager.remove("slow", drain_s=DEADLINE)
        assert states(manager) == {"fake": "ready"}
        slow.go_on.set()
        await manager.loaded(model)
        assert model.engine is None
        assert (manager.get(None).name, states(manager)) == ("fake", {"fake": "ready"})


async def test_stopping_ends_what_is_being_loaded_and_unloaded(slow: SlowSource) -> None:
    async with managing(slow, "fake", "fake:2") as manager:
        added(manager, "slow")
        running(manager.get("fake:2"))
        unloading = asyncio.create_task(manager.remove("fake:2", drain_s=DEADLINE))
        await until(lambda: manager.get("fake:2").unloading)
        engines = [manager.get(name).engine for name in ("fake", "fake:2")]
        await manager.stop()
        assert [engine and engine.state for engine in engines] == [EngineState.STOPPED, EngineState.STOPPED]
        with pytest.raises(asyncio.CancelledError):
            await unloading


# --- routing ----------------------------------------------------------------------------------------------------------


async def test_only_a_ready_model_becomes_the_default(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        added(manager, "slow")
        with pytest.raises(ConflictError, match="because it is loading"):
            manager.set_default("slow")
        with pytest.raises(ModelNotFoundError):
            manager.set_default("none")
        assert manager.get(None).name == "fake"


async def test_without_default_fallback_a_request_must_name_its_model(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        manager.routing = Routing(allow_default_fallback=False)
        with pytest.raises(InvalidRequestError, match="Missing required parameter: 'model'") as caught:
            manager.get(None)
        assert caught.value.param == "model"
        assert manager.get("fake").name == "fake"


async def test_requests_wait_for_a_loading_model_if_the_rules_say_so(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        model = added(manager, "slow")
        far = time.monotonic() + DEADLINE
        await manager.wait_ready(model, far)  # by default nobody waits
        assert model.state == "loading"
        manager.routing = Routing(require_ready_backend=False)
        await manager.wait_ready(manager.get("fake"), far)
        waiting = asyncio.create_task(manager.wait_ready(model, far))
        with pytest.raises(RequestTimeoutError, match=r"did not become ready \(loading\)"):
            await manager.wait_ready(model, time.monotonic())
        assert not waiting.done()
        slow.go_on.set()
        await waiting
        assert model.ready_engine() is model.engine


async def test_a_waiting_request_learns_that_the_model_failed_or_was_unloaded(slow: SlowSource) -> None:
    async with managing(slow) as manager:
        manager.routing = Routing(require_ready_backend=False)
        broken, dropped = added(manager, "slow:broken"), added(manager, "slow")
        waits = [asyncio.create_task(manager.wait_ready(m, time.monotonic() + DEADLINE)) for m in (broken, dropped)]
        await asyncio.sleep(0)
        await manager.remove("slow", drain_s=0)
        slow.go_on.set()
        await asyncio.gather(*waits)
        for model in (broken, dropped):
            with pytest.raises(ModelLoadingError):
                model.ready_engine()


async def test_only_so_many_requests_wait(slow: SlowSource) -> None:
    async with managing(slow, engine={"max_waiting_requests": 1}) as manager:
        manager.routing = Routing(require_ready_backend=False)
        model = added(manager, "slow")
        far = time.monotonic() + DEADLINE
        waiting = asyncio.create_task(manager.wait_ready(model, far))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await manager.wait_ready(model, far)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        slow.go_on.set()
        await manager.wait_ready(model, far)  # the place is free again
