"""Where settings come from, which one wins, and what is said about wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from inferflux_core.config import Loaded, check_bind, check_plugins, load_settings, plugin_problems, served_name
from inferflux_core.errors import ConfigError
from inferflux_core.interfaces import NoSettings, Registration
from inferflux_core.plugins import Distribution, PluginRegistry, load_plugins
from inferflux_core.setting_keys import setting_keys
from inferflux_core.settings import Group, ModelSettings, Settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(
    text: str | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Loaded:
    if text is not None:
        Path("inferflux.yaml").write_text(text, encoding="utf-8")
    return load_settings(None, overrides, environ=environ or {})


def refusal(
    text: str | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, overrides, environ)
    return str(caught.value)


# --- what wins --------------------------------------------------------------------------------------------------------


def test_without_any_configuration_the_demo_model_is_served_on_loopback() -> None:
    loaded = load()
    assert loaded.settings == Settings()
    assert loaded.file is None
    assert loaded.settings.models == (ModelSettings(source="demo"),)
    assert (loaded.settings.server.host, loaded.settings.server.port) == ("127.0.0.1", 8080)
    assert loaded.origin("server.port") == "default"


def test_each_place_wins_over_the_next_key_by_key() -> None:
    loaded = load(
        "server: {port: 1, max_choices: 2, max_json_depth: 5, drain_timeout_s: 4}",
        {"server": {"port": 3}},
        {"INFERFLUX_SERVER__PORT": "2", "INFERFLUX_SERVER__MAX_CHOICES": "3"},
    )
    server = loaded.settings.server
    assert (server.port, server.max_choices, server.max_json_depth, server.host) == (3, 3, 5, "127.0.0.1")
    assert loaded.origin("server.port") == "command line"
    assert loaded.origin("server.max_choices") == "environment INFERFLUX_SERVER__MAX_CHOICES"
    assert loaded.origin("server.max_json_depth") == "file inferflux.yaml"
    assert loaded.origin("server.host") == "default"
    assert loaded.origin("server") == "command line, environment INFERFLUX_SERVER__MAX_CHOICES, file inferflux.yaml"
    assert loaded.file == Path("inferflux.yaml")


def test_free_form_mappings_are_merged_and_lists_replaced() -> None:
    loaded = load(
        "backends: {fake: {step_ms: 1, block_size: 8}}\nmodels: [{source: one}, {source: two, name: b}]",
        {"models": [{"source": "three"}]},
        {"INFERFLUX_BACKENDS__FAKE__STEP_MS": "2.5"},
    )
    assert loaded.settings.backends == {"fake": {"step_ms": 2.5, "block_size": 8}}
    assert loaded.settings.models == (ModelSettings(source="three"),)
    assert loaded.origin("backends.fake.step_ms") == "environment INFERFLUX_BACKENDS__FAKE__STEP_MS"
    assert loaded.origin("backends.fake.block_size") == "file inferflux.yaml"
    assert loaded.origin("models[0].source") == "command line"
    assert loaded.origin("models[0].name") == "default"


def test_a_named_file_wins_over_the_variable_and_that_over_the_current_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("inferflux.yaml", "variable.yaml", "named.yaml"), start=1):
        Path(name).write_text(f"server: {{port: {number}}}", encoding="utf-8")
    environ = {"INFERFLUX_CONFIG": str(tmp_path / "variable.yaml")}
    assert load_settings(environ={}).settings.server.port == 1
    assert load_settings(environ={"INFERFLUX_CONFIG": ""}).settings.server.port == 1
    assert load_settings(environ=environ).settings.server.port == 2
    assert load_settings(environ=environ).file == tmp_path / "variable.yaml"
    assert load_settings(Path("named.yaml"), environ=environ).settings.server.port == 3


def test_relative_paths_in_a_file_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "etc").mkdir()
    file = tmp_path / "etc" / "server.yaml"
    file.write_text(
        """
models:
  - {source: ./a.gguf, chat_template: t.jinja}
  - {source: b/c.gguf}
  - {source: ~/d.gguf, backend_settings: {lora: [{path: ./l.gguf, scale: 1}], regex: a/b}}
  - {source: "hf:owner/repo"}
  - {source: demo}
  - {source: /abs/e.gguf}
model_roots: [models, ~/more]
hub: {cache_dir: ../cache}
""",
        encoding="utf-8",
    )
    settings = load_settings(file, environ={}).settings
    etc = tmp_path / "etc"
    assert [model.source for model in settings.models] == [
        f"{etc}/a.gguf",
        f"{etc}/b/c.gguf",
        f"{tmp_path}/home/d.gguf",
        "hf:owner/repo",
        "demo",
        "/abs/e.gguf",
    ]
    assert settings.models[0].chat_template == etc / "t.jinja"
    assert settings.models[2].backend_settings == {"lora": [{"path": f"{etc}/l.gguf", "scale": 1}], "regex": "a/b"}
    assert settings.model_roots == (etc / "models", tmp_path / "home" / "more")
    assert settings.hub.cache_dir == etc / "../cache"


def test_elsewhere_relative_paths_stay_and_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    loaded = load(None, {"models": [{"source": "~/a.gguf"}]}, {"INFERFLUX_HUB__CACHE_DIR": "cache"})
    assert loaded.settings.models[0].source == "/home/somebody/a.gguf"
    assert loaded.settings.hub.cache_dir == Path("cache")


# --- environment ------------------------------------------------------------------------------------------------------


def test_variables_of_every_type() -> None:
    settings = load(
        environ={
            "INFERFLUX_SERVER": '{"port": 1, "max_choices": 2}',
            "INFERFLUX_SERVER__PORT": "9000",
            "INFERFLUX_SERVER__INSECURE_NO_AUTH": "true",
            "INFERFLUX_MODELS": '[{"source": "fake", "aliases": ["a"]}]',
            "INFERFLUX_MODEL_ROOTS": "null",
            "INFERFLUX_ENGINE__ITL_TARGET_MS": "none",
            "INFERFLUX_BACKENDS__FAKE": '{"block_size": 8}',
            "INFERFLUX_BACKENDS__FAKE__LAYOUT": "paged",
            "INFERFLUX_HUB__TOKEN": "hf_abc",
            "INFERFLUX_CONFIG": "",
            "PATH": "/bin",
            "INFERCTL_URL": "http://elsewhere",
        }
    ).settings
    assert (settings.server.port, settings.server.max_choices, settings.server.insecure_no_auth) == (9000, 2, True)
    assert settings.models == (ModelSettings(source="fake", aliases=("a",)),)
    assert settings.model_roots is None
    assert settings.engine.itl_target_ms is None
    assert settings.backends == {"fake": {"block_size": 8, "layout": "paged"}}
    assert settings.hub.token is not None
    assert settings.hub.token.get_secret_value() == "hf_abc"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SERVER__PORT", "abc", "server.port: should be a valid integer, not 'abc'"),
        ("SERVER__PORT", "65536", "server.port: should be less than or equal to 65535, not '65536'"),
        ("SERVER_PORT", "1", "unknown setting; did you mean INFERFLUX_SERVER__PORT?"),
        ("PORT", "1", "unknown setting; did you mean INFERFLUX_SERVER__PORT?"),
        ("Server__Port", "1", "unknown setting; did you mean INFERFLUX_SERVER__PORT?"),
        ("LOGGING__LEVL", "info", "unknown setting; did you mean INFERFLUX_LOGGING__LEVEL?"),
        (
            "XYZZY",
            "1",
            "unknown setting; `inferflux config show` lists the settings; for server.port the variable is "
            "INFERFLUX_SERVER__PORT",
        ),
        (
            "MODELS__0__SOURCE",
            "demo",
            "models is a list; set it as a whole, as JSON, with INFERFLUX_MODELS",
        ),
        ("PLUGINS__BLOCKED", "one,two", 'must be JSON, such as ["one", "two"]'),
        ("PLUGINS__BLOCKED", "{}", 'must be a JSON list, such as ["one", "two"]'),
        ("SERVER", "[]", 'must be a JSON object, such as {"key": "value"}'),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, message: str) -> None:
    assert refusal(environ={f"INFERFLUX_{variable}": value}) == f"environment INFERFLUX_{variable}: {message}"


def test_variables_that_kubernetes_sets_for_a_service_of_that_name_are_not_ours() -> None:
    environ = {
        "INFERFLUX_SERVICE_HOST": "10.0.0.1",
        "INFERFLUX_SERVICE_PORT": "80",
        "INFERFLUX_SERVICE_PORT_HTTP": "80",
        "INFERFLUX_PORT": "tcp://10.0.0.1:80",
        "INFERFLUX_PORT_80_TCP": "tcp://10.0.0.1:80",
        "INFERFLUX_PORT_80_TCP_PROTO": "tcp",
        "INFERFLUX_SERVER_PORT": "tcp://10.0.0.1:80",
        "INFERFLUX_SERVER_SERVICE_HOST": "10.0.0.1",
    }
    # the last two are those of a service named inferflux-server
    assert load(environ=environ).settings == Settings()


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_each_with_its_place() -> None:
    text = """\
server:
  prot: 1
  port: 2
  port: 3
hub:
  token: 5
max_num_seqs: 4
models:
  - {source: demo, namee: a}
  - name: b
logging:
  level: loud
"""
    message = refusal(text, {"engine": {"max_num_seq": 1}}, {"INFERFLUX_SERVER__MAX_CHOICES": "0"})
    lines = message.splitlines()
    assert lines[0] == f"{len(lines) - 1} problems in the configuration:"
    assert sorted(lines[1:]) == [
        "  command line: unknown setting 'engine.max_num_seq'; did you mean 'engine.max_num_seqs'?",
        "  environment INFERFLUX_SERVER__MAX_CHOICES: server.max_choices: should be greater than or equal to 1, not '0'",
        "  inferflux.yaml:10: models[1].source: is missing and has no default; set it",
        "  inferflux.yaml:12: logging.level: should be 'debug', 'info', 'warning' or 'error', not 'loud'",
        "  inferflux.yaml:2: unknown setting 'server.prot'; did you mean 'server.port'?",
        "  inferflux.yaml:4: 'server.port' is set twice, first in line 3; remove one of them",
        "  inferflux.yaml:6: hub.token: should be a valid string",
        "  inferflux.yaml:7: unknown setting 'max_num_seqs'; did you mean 'engine.max_num_seqs' or 'models[].max_num_seqs'?",
        "  inferflux.yaml:9: unknown setting 'models[0].namee'; did you mean 'models[0].name'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- server", ":1: the file must hold a mapping at its top level; write keys and values, such as "
                     "`server: {port: 8080}`"),
        ("server: {port: 1\n", ":2: not valid YAML: expected ',' or '}', but got '<stream end>'"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        ("server: !!python/object/apply:os.getcwd []\n", ":1: the tag "
         "'tag:yaml.org,2002:python/object/apply:os.getcwd' is not allowed; write plain values, lists and mappings"),
        ("server: {host: !secret x}\n", ":1: the tag '!secret' is not allowed; write plain values"),
        ("server: &all\n  port: *all\n", ":1: an alias refers to something that contains it"),
        ("server:\n  1: x\n", ":2: a key must be text; put it in quotes if it is the name of something"),
        ("a: 2024-99-99\n", ":1: not a valid timestamp; put it in quotes if it is text"),
        ("a: \x07\n", ": not valid YAML: it holds control characters; remove them"),
        ("server: 5\n", ":1: server: must be a mapping of keys to values"),
        ("models: demo\n", ":1: models: must be a list"),
        ("models: []\n", ":1: models: has too few items"),
        ("models: [demo]\n", ":1: models[0]: must be a mapping of keys to values"),
        ("backends:\n  fake: 1\n", ":2: backends.fake: must be a mapping of keys to values"),
        ("colour: blue\n", ":1: unknown setting 'colour'; there are: server, models, model_roots, engine, backends, "
                           "structured_output, hub, plugins, logging, metrics, state_dir, auth, policy, limits, audit"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_line(text: str, message: str) -> None:
    assert refusal(text) == f"inferflux.yaml{message}"


def test_a_deeply_nested_file_is_refused() -> None:
    assert refusal("a: " + "[" * 5000 + "]" * 5000) == "inferflux.yaml: nested too deeply"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Path("nope.yaml"), environ={})
    assert str(caught.value) == "--config: there is no file 'nope.yaml'; correct the path"
    assert refusal(environ={"INFERFLUX_CONFIG": "nope.yaml"}) == (
        "environment INFERFLUX_CONFIG: there is no file 'nope.yaml'; correct the path"
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path, environ={})
    assert str(caught.value) == f"cannot read the configuration file {str(tmp_path)!r}: Is a directory; check the path"
    Path("latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError) as caught:
        load_settings(Path("latin.yaml"), environ={})
    assert str(caught.value) == "latin.yaml: not UTF-8 text at byte 3; save the file as UTF-8"


def test_empty_files_empty_sections_and_merge_keys_are_fine() -> None:
    assert load("").settings == Settings()
    assert load("# nothing yet\n").settings == Settings()
    assert load("server:\n  # port: 1\nbackends:\n").settings == Settings()
    assert load("\ufeffserver: {port: 7}\n").settings.server.port == 7
    merged = load("models: [&one {source: fake, name: a, max_num_seqs: 2}, {<<: *one, name: b}]").settings.models
    assert merged[1] == ModelSettings(source="fake", name="b", max_num_seqs=2)


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("hub: {token: s3cr3t, tokn: s3cr3t}", {}),
        ("hub: {token: [s3cr3t]}", {}),
        ("hub: {token: s3cr3t, %x: }", {}),
        ("hub: s3cr3t\nserver: x", {}),
        ("server: x", {"INFERFLUX_HUB__TOKEN": "s3cr3t"}),
        (None, {"INFERFLUX_HUB": "s3cr3t"}),
    ],
)
def test_secrets_are_in_no_message(text: str | None, environ: dict[str, str]) -> None:
    assert "s3cr3t" not in refusal(text, environ=environ)


def test_secrets_are_not_in_the_representation_of_settings() -> None:
    assert "s3cr3t" not in repr(load("hub: {token: s3cr3t}"))


# --- choices among plugins --------------------------------------------------------------------------------------------


class Speed(Group):
    """Settings of the scheduler and backends below."""

    speed: int = Field(1, ge=0)


def registry() -> PluginRegistry:
    registry = PluginRegistry()
    distribution = Distribution("some-plugins", "1.0")
    for kind, name in (("scheduler", "fcfs"), ("scheduler", "fast"), ("backend", "one"), ("backend", "two")):
        settings = Speed if name in ("fast", "one") else NoSettings
        registry.add(kind, Registration(name=name, factory=object, settings=settings), distribution)
    return registry


def test_settings_that_fit_the_plugins_pass() -> None:
    text = """
engine: {scheduler: fast, scheduler_settings: {speed: 3}}
backends: {one: {speed: 3}}
models:
  - {source: demo, backend: one, backend_settings: {speed: 4}, default: true}
  - {source: fake, backend_settings: {speed: 4}}
  - {source: fake, name: other, backend: two}
"""
    check_plugins(load(text).settings, registry())


def test_every_choice_that_does_not_fit_is_reported() -> None:
    text = """
engine: {scheduler: lifo}
backends: {one: {speed: -1}, three: {}}
models:
  - {source: demo, backend: four, default: true}
  - {source: demo, name: a, aliases: [b], backend_settings: {colour: 1}}
  - {source: fake, name: b, default: true, backend: two, backend_settings: {speed: 4}}
  - {source: demo, backend: one}
"""
    with pytest.raises(ConfigError) as caught:
        check_plugins(load(text).settings, registry())
    unregistered = "correct the name or install the package that provides it"
    assert str(caught.value).splitlines() == [
        "9 problems in the configuration:",
        "  engine.scheduler: no installed plugin registers a scheduler named 'lifo' (there are: fast, fcfs); " + unregistered,
        "  backends.one: settings of backend 'one' (some-plugins 1.0): speed: Input should be greater than or equal to 0",
        "  backends.three: no installed plugin registers a backend named 'three' (there are: one, two); " + unregistered,
        "  models[0].backend: no installed plugin registers a backend named 'four' (there are: one, two); " + unregistered,
        "  models[1].backend_settings: no installed backend takes them (settings of backend 'one' (some-plugins 1.0): "
        "speed: Input should be greater than or equal to 0; colour: Extra inputs are not permitted; settings of backend "
        "'two' (some-plugins 1.0): colour: Extra inputs are not permitted); correct them, or name the backend",
        "  models[2].backend: settings of backend 'two' (some-plugins 1.0): speed: Extra inputs are not permitted",
        "  models[2]: the name 'b' is already used by models[1]; set another name or alias",
        "  models[3]: the name 'demo' is already used by models[0]; set another name or alias",
        "  models: only one model can be the default, not models[0] and models[2]; set default on one",
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "demo"),
        ("/srv/models/Llama-3.Q4_K_M.gguf", "Llama-3.Q4_K_M"),
        ("./phi", "phi"),
        ("hf:owner/repo", "owner/repo"),
        ("hf:owner/repo:Q4_K_M@main", "owner/repo"),
        ("fake:a", "fake:a"),
    ],
)
def test_a_model_is_named_after_its_source(source: str, name: str) -> None:
    assert served_name(ModelSettings(source=source)) == name
    assert served_name(ModelSettings(source=source, name="mine")) == "mine"


# --- where to listen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_authentication(host: str) -> None:
    check_bind(load(overrides={"server": {"host": host}}).settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0", "192.168.1.5", "example.com", "localhost.example.com"])
def test_other_addresses_are_refused_unless_allowed(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_bind(load(overrides={"server": {"host": host}}).settings)
    assert str(caught.value) == (
        f"server.host: {host!r} can be reached from other machines, and no auth provider is configured; set "
        f"auth.providers (such as [api_keys]), listen on 127.0.0.1, or let anyone use the models with --insecure-no-auth "
        f"(server.insecure_no_auth: true)"
    )
    check_bind(load(overrides={"server": {"host": host}, "auth": {"providers": ["api_keys"]}}).settings)
    check_bind(load(overrides={"server": {"host": host, "insecure_no_auth": True}}).settings)


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_example_file_is_valid_and_mentions_every_setting() -> None:
    file = EXAMPLES / "inferflux.yaml"
    settings = load_settings(file, environ={}).settings
    assert settings.server == Settings().server
    assert settings.engine == Settings().engine
    text = file.read_text(encoding="utf-8")
    assert [key.name for key in setting_keys() if f"{key.path[-1]}:" not in text] == []


# --- speculation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{method: ngrams}", "engine.speculative.method: no installed plugin registers a proposer named 'ngrams'"),
        ("{method: ngram, settings: {depth: 3}}", "engine.speculative.method: settings of proposer 'ngram'"),
        ("{method: draft_model}", "engine.speculative.model: the method 'draft_model' needs a draft model; name its source"),
        ("{model: demo}", "engine.speculative.method: there is a draft model, but nothing that asks it"),
        ("{method: draft_model, model: demo, backend: none}", "engine.speculative.backend: no installed plugin registers"),
    ],
)  # fmt: skip
def test_speculation_that_cannot_work_is_refused(text: str, message: str) -> None:
    problems = plugin_problems(load(f"engine:\n  speculative: {text}\n").settings, load_plugins())
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_draft_models_path_is_relative_to_the_file() -> None:
    loaded = load("models: [{source: demo, speculative: {method: draft_model, model: ./small.gguf}}]\n")
    speculative = loaded.settings.models[0].speculative
    assert speculative is not None
    assert speculative.model == str(Path.cwd() / "small.gguf")
