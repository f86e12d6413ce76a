"""Loading plugins: what is wrong stops the start and names the culprit. The hooks' documented examples work."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import Field

from inferflux_core import hookspecs
from inferflux_core.engine.kv.manager import make_kv_cache_manager
from inferflux_core.engine.scheduler import SchedulerContext
from inferflux_core.engine.types import EngineRequest, SamplingParams
from inferflux_core.errors import ModelFileError, PluginError
from inferflux_core.interfaces import (
    Backend,
    Capabilities,
    EngineConfig,
    KVCacheSpec,
    ModelFiles,
    Registration,
    SourceContext,
)
from inferflux_core.plugins import KINDS, Distribution, PluginRegistry, load_plugins
from inferflux_core.settings import Group

Install = Callable[..., None]

PREAMBLE = "from inferflux_core.hookspecs import hookimpl\nfrom inferflux_core.interfaces import Registration\n"

# What other packages of the workspace register, or whether they are installed, does not matter here.
BLOCKED = ["inferflux-auth-oidc", "inferflux-backend-llamacpp", "inferflux-backend-torch"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes an installed distribution out of a module's source."""
    modules: list[str] = []

    def install(name: str, source: str, version: str = "1.0", value: str | None = None) -> None:
        module = name.replace("-", "_")
        folder = tmp_path / name
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[inferflux]\nmain = {value or module}\n", encoding="utf-8")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def refusal() -> str:
    with pytest.raises(PluginError) as caught:
        load_plugins(BLOCKED)
    return str(caught.value)


# --- what core registers ----------------------------------------------------------------------------------------------


def test_core_registers_through_the_same_hooks() -> None:
    registry = load_plugins(BLOCKED)
    assert [(entry.kind, entry.registration.name, entry.distribution.name) for entry in registry] == [
        ("backend", "fake", "inferflux-core"),
        ("scheduler", "fair", "inferflux-core"),
        ("scheduler", "fcfs", "inferflux-core"),
        ("scheduler", "priority", "inferflux-core"),
        ("proposer", "draft_model", "inferflux-core"),
        ("proposer", "ngram", "inferflux-core"),
        ("model source", "demo", "inferflux-core"),
        ("model source", "fake", "inferflux-core"),
        ("model source", "hf", "inferflux-core"),
        ("model source", "path", "inferflux-core"),
        ("auth provider", "api_keys", "inferflux-core"),
    ]
    assert all(entry.registration.summary for entry in registry)


def test_every_hook_belongs_to_one_kind() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("inferflux_")]
    assert sorted(KINDS.values()) == sorted(hooks)


def test_a_plugin_registers_beside_core(install: Install) -> None:
    install(
        "acme-sources",
        PREAMBLE + "@hookimpl\n"
        "def inferflux_model_sources():\n"
        "    yield Registration(name='s3', factory=dict, summary='a bucket')\n",
        version="2.1",
    )
    entry = load_plugins(BLOCKED).get("model source", "s3")
    assert entry.distribution == Distribution("acme-sources", "2.1")
    assert entry.registration == Registration(name="s3", factory=dict, summary="a bucket")


def test_a_blocked_plugin_is_not_even_imported(install: Install) -> None:
    install("acme-broken", "raise RuntimeError('imported')")
    with pytest.raises(PluginError):
        load_plugins(BLOCKED)
    assert "inferflux-core" in {entry.distribution.name for entry in load_plugins([*BLOCKED, "Acme_Broken"])}


# --- what stops the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import surely_not_installed", "ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("def broken(:\n", "SyntaxError: "),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    ],
)
def test_an_import_error(install: Install, source: str, error: str) -> None:
    install("acme", source, version="1.2")
    message = refusal()
    assert message.startswith(f"plugin 'acme' of acme 1.2 cannot be imported: {error}")
    assert message.endswith("repair or uninstall acme, or block it with plugins.blocked in the configuration")


def test_an_entry_point_without_its_module(install: Install) -> None:
    install("acme", "", value="acme_elsewhere")
    assert refusal().startswith(
        "plugin 'acme_elsewhere' of acme 1.0 cannot be imported: ModuleNotFoundError: No module named 'acme_elsewhere'; "
    )


def test_an_unknown_hook(install: Install) -> None:
    install("acme", PREAMBLE + "@hookimpl\ndef inferflux_bakends():\n    return []\n")
    message = refusal()
    assert message.startswith("plugin 'main' of acme 1.0 does not fit the hooks: ")
    assert "inferflux_bakends" in message


def test_a_hook_with_arguments_of_its_own(install: Install) -> None:
    install("acme", PREAMBLE + "@hookimpl\ndef inferflux_backends(config):\n    return []\n")
    message = refusal()
    assert message.startswith("plugin 'main' of acme 1.0 does not fit the hooks: ")
    assert "inferflux_backends" in message


def test_a_name_that_core_uses(install: Install) -> None:
    install("acme", PREAMBLE + "@hookimpl\ndef inferflux_schedulers():\n    return [Registration(name='fcfs', factory=dict)]\n")
    message = refusal()
    assert message.startswith("two plugins register the scheduler 'fcfs': ")
    assert "inferflux-core 0.1.0" in message
    assert "acme 1.0" in message


def test_a_name_that_another_plugin_uses(install: Install) -> None:
    source = PREAMBLE + "@hookimpl\ndef inferflux_backends():\n    return [Registration(name='gpu', factory=dict)]\n"
    install("acme", source)
    install("zeta", source, version="3.0")
    message = refusal()
    assert message.startswith("two plugins register the backend 'gpu': ")
    assert {"acme 1.0", "zeta 3.0"} == {name for name in ("acme 1.0", "zeta 3.0") if name in message}


@pytest.mark.parametrize(
    ("body", "blamed"),
    [
        ("raise ValueError('too old')", "raised ValueError: too old"),
        ("yield 1 / 0", "ZeroDivisionError: division by zero"),
        ("return [5]", "returned 5; it must return Registration objects"),
        ("return 5", "returned 5; it must return Registration objects"),
        ("return 'fake'", "returned 'fake'; it must return Registration objects"),
        ("return Registration(name='x', factory=dict)", "it must return Registration objects"),
        ("return [Registration]", "it must return Registration objects"),
        ("return [Registration(name=5, factory=dict)]", "must have a name"),
        ("return [Registration(name='', factory=dict)]", "must have a name"),
        ("return [Registration(name='x', factory='dict')]", "must have a factory"),
        ("return [Registration(name='x', factory=dict, settings=dict)]", "must be a pydantic model"),
    ],
)
def test_a_hook_that_fails_or_returns_something_else(install: Install, body: str, blamed: str) -> None:
    install("acme", PREAMBLE + f"@hookimpl\ndef inferflux_backends():\n    {body}\n", version="1.2")
    message = refusal()
    assert message.startswith("hook inferflux_backends of plugin 'main' (acme 1.2) ")
    assert blamed in message


# --- looking up and making --------------------------------------------------------------------------------------------


class Bounds(Group):
    """Settings of the part below."""

    low: int
    high: int = Field(9, le=9)


class Part:
    def __init__(self, settings: Bounds, *context: str) -> None:
        if settings.low > settings.high:
            raise ValueError("low is above high")
        self.settings, self.context = settings, context


@pytest.fixture
def registry() -> PluginRegistry:
    registry = PluginRegistry()
    registry.add("scheduler", Registration(name="bounded", factory=Part, settings=Bounds), Distribution("acme", "1.2"))
    registry.add("scheduler", Registration(name="plain", factory=Part), Distribution("acme", "1.2"))
    return registry


def test_an_unknown_name(registry: PluginRegistry) -> None:
    with pytest.raises(PluginError) as caught:
        registry.create("scheduler", "lifo", {})
    assert str(caught.value) == (
        "no installed plugin registers a scheduler named 'lifo' (there are: bounded, plain); "
        "correct the name or install the package that provides it"
    )
    with pytest.raises(PluginError, match=r"^no installed plugin registers a backend named 'plain' \(there are: none\)"):
        registry.get("backend", "plain")


def test_bad_settings(registry: PluginRegistry) -> None:
    with pytest.raises(PluginError) as caught:
        registry.settings("scheduler", "bounded", {"high": 10, "wide": True})
    assert str(caught.value) == (
        "settings of scheduler 'bounded' (acme 1.2): low: Field required; "
        "high: Input should be less than or equal to 9; wide: Extra inputs are not permitted"
    )
    with pytest.raises(PluginError) as caught:
        registry.create("scheduler", "plain", {"low": 1})
    assert str(caught.value) == "settings of scheduler 'plain' (acme 1.2): low: Extra inputs are not permitted"


def test_the_factory_gets_validated_settings_and_the_context(registry: PluginRegistry) -> None:
    part = registry.create("scheduler", "bounded", {"low": "3"}, "context")
    assert isinstance(part, Part)
    assert part.settings == Bounds(low=3, high=9)
    assert part.context == ("context",)


def test_a_factory_that_fails(registry: PluginRegistry) -> None:
    with pytest.raises(PluginError) as caught:
        registry.create("scheduler", "bounded", {"low": 3, "high": 2})
    assert str(caught.value) == "scheduler 'bounded' of acme 1.2 failed to start: ValueError: low is above high"


# --- the examples in the hooks' docstrings ----------------------------------------------------------------------------


def documented_plugin(hook: str) -> str:
    """The indented part at the end of a hook's docstring: a complete module."""
    text = inspect.getdoc(getattr(hookspecs, hook))
    assert text is not None
    _, _, code = text.partition("\n\n    ")
    return inspect.cleandoc(code)


@pytest.mark.parametrize("hook", KINDS.values())
def test_each_hook_documents_a_complete_plugin(install: Install, hook: str) -> None:
    install("acme-documented", documented_plugin(hook))
    added = [entry for entry in load_plugins(BLOCKED) if entry.distribution.name == "acme-documented"]
    assert [KINDS[entry.kind] for entry in added] == [hook]


def test_the_documented_backend_serves_the_fake_model(install: Install) -> None:
    install("acme-documented", documented_plugin("inferflux_backends"))
    backend = load_plugins(BLOCKED).create("backend", "echo", {})
    assert isinstance(backend, Backend)
    files = ModelFiles(ref="fake", format="fake", paths=())
    assert backend.supports(files)
    runner = backend.runner(files, EngineConfig())
    assert runner.model_info.vocab_size == backend.tokenizer(files).vocab_size
    runner.close()


def test_the_documented_scheduler_takes_the_shortest_prompt(install: Install) -> None:
    install("acme-documented", documented_plugin("inferflux_schedulers"))
    context = SchedulerContext(
        config=EngineConfig(),
        caps=Capabilities(max_num_seqs=1, max_num_batched_tokens=64),
        kv=make_kv_cache_manager(KVCacheSpec(layout="paged", num_blocks=8), enable_prefix_caching=False),
        eos_token_ids=frozenset({0}),
    )
    scheduler = load_plugins(BLOCKED).create("scheduler", "shortest", {}, context)
    for number, length in enumerate((5, 2, 9, 2)):
        scheduler.add_request(
            EngineRequest(
                request_id=f"r{number}",
                prompt_token_ids=list(range(1, length + 1)),
                params=SamplingParams(max_tokens=1),
                arrival_time=float(number),
            )
        )
    assert [scheduler.pop_waiting().request_id for _ in range(4)] == ["r1", "r3", "r0", "r2"]


def test_the_documented_source_finds_models_on_the_share(install: Install) -> None:
    install("acme-documented", documented_plugin("inferflux_model_sources"))
    source = load_plugins(BLOCKED).create("model source", "share", {})
    assert source.matches("share:llama")
    assert not source.matches("demo")
    with pytest.raises(ModelFileError, match=r"^no model 'share:llama' on the share; run `ls /srv/models`"):
        source.resolve("share:llama", SourceContext())
