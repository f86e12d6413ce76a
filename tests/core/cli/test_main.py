"""The `inferflux` command as a user sees it: help, exit codes, messages, and what its options become."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inferflux_core.cli.main import COMMANDS, cli
from inferflux_core.config import Loaded, load_settings
from inferflux_core.effective import MASK
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import ModelSettings, Settings

HEAVY = ("pydantic", "yaml", "pluggy", "msgspec", "httpx", "rich", "fastapi", "numpy", "zmq", "uvicorn")
SERVER_ONLY = ("fastapi", "starlette", "numpy", "zmq", "uvicorn", "httpx", "huggingface_hub")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("INFERFLUX_")]:
        monkeypatch.delenv(variable)


def inferflux(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process. An exception that it does not handle fails the test."""
    result = CliRunner().invoke(cli, arguments, env=env, prog_name="inferflux")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Server:
    """Stands in for the server: remembers what it was asked to run."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.loaded: Loaded | None = None
        self.registry: PluginRegistry | None = None

    def run(self, loaded: Loaded, registry: PluginRegistry) -> int:
        self.loaded, self.registry = loaded, registry
        return self.code

    @property
    def settings(self) -> Settings:
        assert self.loaded is not None
        return self.loaded.settings


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    module = ModuleType("inferflux_core.serving.server")
    module.run = server.run  # type: ignore[attr-defined]  # a module made here declares nothing
    monkeypatch.setitem(sys.modules, "inferflux_core.serving.server", module)
    return server


# --- the group --------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\n"
        "from inferflux_core.cli.main import cli\n"
        "try:\n    cli(['--help'])\n"
        f"finally:\n    print('imported:', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.splitlines()[-1] == "imported: []"
    for name, (_, _, summary) in COMMANDS.items():
        assert f"  {name.ljust(7)}  {summary}" in done.stdout.splitlines()


def test_help_answers_within_three_tenths_of_a_second() -> None:
    def measure() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "inferflux_core.cli.main", "--help"], capture_output=True, check=True, timeout=20)
        return time.perf_counter() - began

    assert min(measure() for _ in range(5)) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = inferflux(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: inferflux {name} ")


def test_version() -> None:
    result = inferflux("--version")
    assert (result.exit_code, result.stdout) == (0, "inferflux 0.1.0\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("serv", "did you mean 'serve'?"), ("xyzzy", "there are: serve, pull, models, plugins, config, bench")],
)
def test_an_unknown_command(name: str, hint: str) -> None:
    result = inferflux(name)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: there is no command {name!r}; {hint}"


def test_reading_the_configuration_imports_nothing_of_the_server() -> None:
    script = (
        "import sys\n"
        "from inferflux_core.cli.main import cli\n"
        "try:\n    cli(['config', 'show'])\n"
        f"finally:\n    print('imported:', [m for m in {SERVER_ONLY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.splitlines()[-1] == "imported: []"


# --- config -----------------------------------------------------------------------------------------------------------


def test_check_says_what_would_be_served() -> None:
    Path("my.yaml").write_text(
        """
server: {port: 9000}
engine: {scheduler: fair}
models:
  - {source: ./llama.gguf, aliases: [one, two], backend: fake}
  - {source: fake, name: other, default: true}
""",
        encoding="utf-8",
    )
    result = inferflux("config", "check", "--config", "my.yaml")
    assert result.stdout.splitlines() == [
        "ok: my.yaml",
        "listen on 127.0.0.1 port 9000",
        "scheduler fair",
        f"model llama alias one alias two from {Path.cwd()}/llama.gguf, backend fake",
        "model other from fake, backend auto, default",
    ]
    assert (result.exit_code, result.stderr) == (0, "")


def test_check_without_any_configuration() -> None:
    result = inferflux("config", "check")
    assert result.stdout.splitlines() == [
        "ok: no configuration file; environment and defaults only",
        "listen on 127.0.0.1 port 8080",
        "scheduler fcfs",
        "model demo from demo, backend auto, default",
    ]


def test_check_reports_every_problem_and_exits_with_2() -> None:
    Path("inferflux.yaml").write_text("server: {prot: 1}\nengine: {max_num_seqs: 0}\n", encoding="utf-8")
    result = inferflux("config", "check", env={"INFERFLUX_SERVER__PORT": "x"})
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: 3 problems in the configuration:"
    assert sorted(lines[1:]) == [
        "  environment INFERFLUX_SERVER__PORT: server.port: should be a valid integer, not 'x'",
        "  inferflux.yaml:1: unknown setting 'server.prot'; did you mean 'server.port'?",
        "  inferflux.yaml:2: engine.max_num_seqs: should be greater than or equal to 1, not 0",
    ]


def test_check_covers_plugins_their_settings_and_the_address() -> None:
    Path("inferflux.yaml").write_text(
        "server: {host: 0.0.0.0}\nengine: {scheduler: lifo}\nbackends: {fake: {layout: round}}\n", encoding="utf-8"
    )
    result = inferflux("config", "check")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: 3 problems in the configuration:"
    assert lines[1].startswith("  engine.scheduler: no installed plugin registers a scheduler named 'lifo' (there are: ")
    assert lines[2] == (
        "  backends.fake: settings of backend 'fake' (inferflux-core 0.1.0): layout: Input should be 'paged' or 'sequence'"
    )
    assert lines[3].startswith("  server.host: '0.0.0.0' can be reached from other machines")
    assert len(lines) == 4


def test_show_gives_each_value_with_its_origin() -> None:
    Path("inferflux.yaml").write_text(
        "models: [{source: fake, aliases: [a, b], backend_settings: {step_ms: 1}}]\nhub: {token: s3cr3t}\n",
        encoding="utf-8",
    )
    result = inferflux("config", "show", env={"INFERFLUX_SERVER__PORT": "9000"})
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "host: 127.0.0.1 # default",
        "port: 9000 # environment INFERFLUX_SERVER__PORT",
        "- source: fake # file inferflux.yaml",
        "aliases: [a, b] # file inferflux.yaml",
        "name: null # default",
        "step_ms: 1 # file inferflux.yaml",
        f"token: '{MASK}' # file inferflux.yaml",
    ):
        assert line in lines
    assert "s3cr3t" not in result.stdout
    assert len({line.index("# ") for line in result.stdout.splitlines() if "# " in line}) == 1


def test_what_show_prints_is_a_configuration_that_means_the_same(tmp_path: Path) -> None:
    text = """
server: {port: 9000, host: "::1"}
models:
  - {source: /m/a.gguf, name: "yes: no # maybe", aliases: [x], backend_settings: {step_ms: 1.5}}
  - {source: demo, default: true}
backends: {fake: {block_size: 8}}
model_roots: [/m, "/n o"]
engine: {itl_target_ms: null}
"""
    Path("inferflux.yaml").write_text(text, encoding="utf-8")
    shown = tmp_path / "shown.yaml"
    shown.write_text(inferflux("config", "show").stdout, encoding="utf-8")
    assert load_settings(shown, environ={}).settings == load_settings(environ={}).settings


def test_show_as_json() -> None:
    result = inferflux("config", "show", "--json", env={"INFERFLUX_HUB__TOKEN": "s3cr3t"})
    document = json.loads(result.stdout)
    assert document["file"] is None
    assert document["settings"]["server.port"] == {"value": 8080, "origin": "default"}
    assert document["settings"]["models[0].source"] == {"value": "demo", "origin": "default"}
    assert document["settings"]["hub.token"] == {"value": MASK, "origin": "environment INFERFLUX_HUB__TOKEN"}


def test_show_masks_plugin_settings_that_nobody_knows_to_be_public() -> None:
    Path("inferflux.yaml").write_text(
        """
backends: {fake: {step_ms: 1, api_key: s3cr3t}, elsewhere: {api_key: s3cr3t}}
engine: {scheduler_settings: {api_key: s3cr3t}}
models: [{source: demo, backend_settings: {api_key: s3cr3t, step_ms: 2}}]
""",
        encoding="utf-8",
    )
    result = inferflux("config", "show", "--json")
    settings = json.loads(result.stdout)["settings"]
    assert settings["backends.fake.step_ms"]["value"] == 1
    assert settings["models[0].backend_settings.step_ms"]["value"] == 2
    assert [key for key, item in settings.items() if item["value"] == MASK] == [
        "models[0].backend_settings.api_key",
        "engine.scheduler_settings.api_key",
        "backends.fake.api_key",
        "backends.elsewhere.api_key",
    ]


# --- plugins ----------------------------------------------------------------------------------------------------------


def active_parts(*arguments: str) -> dict[tuple[str, str], str | None]:
    blocked = '["inferflux-auth-oidc", "inferflux-backend-llamacpp", "inferflux-backend-torch"]'
    result = inferflux("plugins", "--json", *arguments, env={"INFERFLUX_PLUGINS__BLOCKED": blocked})
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert all(row["active"] == (row["chosen_by"] is not None) for row in rows)
    assert {(row["distribution"], row["version"]) for row in rows} == {("inferflux-core", "0.1.0")}
    return {(row["kind"], row["name"]): row["chosen_by"] for row in rows}


def test_plugins_tell_what_is_in_use() -> None:
    assert active_parts() == {
        ("backend", "fake"): "auto",
        ("scheduler", "fair"): None,
        ("scheduler", "fcfs"): "engine.scheduler",
        ("scheduler", "priority"): None,
        ("proposer", "draft_model"): None,
        ("proposer", "ngram"): None,
        ("model source", "demo"): "always",
        ("model source", "fake"): "always",
        ("model source", "hf"): "always",
        ("model source", "path"): "always",
        ("auth provider", "api_keys"): None,
    }
    Path("my.yaml").write_text(
        "engine: {scheduler: fair}\n"
        "models: [{source: demo, backend: other}, {source: fake, backend: fake, speculative: {method: ngram}}]\n"
        "auth: {providers: [api_keys]}",
        encoding="utf-8",
    )
    parts = active_parts("--config", "my.yaml")
    assert parts["scheduler", "fair"] == "engine.scheduler"
    assert parts["scheduler", "fcfs"] is None
    assert parts["backend", "fake"] == "models[1].backend"
    assert parts["proposer", "ngram"] == "models[1].speculative"
    assert parts["auth provider", "api_keys"] == "auth.providers"


def test_plugins_as_a_table() -> None:
    lines = inferflux("plugins").stdout.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "kind name from active summary" in rows
    assert "scheduler fcfs inferflux-core 0.1.0 yes first come, first served" in rows
    assert "scheduler priority inferflux-core 0.1.0 no lowest priority value first, then arrival" in rows


# --- serve ------------------------------------------------------------------------------------------------------------


def test_serve_runs_the_default_configuration(server: Server) -> None:
    server.code = 7
    assert inferflux("serve").exit_code == 7
    assert server.settings == Settings()
    assert server.registry is not None
    assert server.registry.get("scheduler", "fcfs").distribution.name == "inferflux-core"


def test_every_option_becomes_a_setting(server: Server) -> None:
    arguments = (
        "--model demo --name main --alias a --alias b --backend fake --host 0.0.0.0 --port 9000 --scheduler fair "
        "--max-num-seqs 3 --max-model-len 64 --max-num-batched-tokens 128 --itl-target-ms 50.5 --log-level debug "
        "--log-format json --insecure-no-auth --offline --set server.max_choices=4 --set backends.fake.block_size=8 "
        "--set plugins.blocked=[nobody]"
    )
    assert inferflux("serve", *arguments.split()).exit_code == 0
    settings = server.settings
    assert settings.models == (ModelSettings(source="demo", name="main", aliases=("a", "b"), backend="fake"),)
    changed = settings.model_dump(exclude_defaults=True)
    del changed["models"]
    assert changed == {
        "server": {"host": "0.0.0.0", "port": 9000, "insecure_no_auth": True, "max_choices": 4},
        "engine": {
            "scheduler": "fair",
            "max_num_seqs": 3,
            "max_model_len": 64,
            "max_num_batched_tokens": 128,
            "itl_target_ms": 50.5,
        },
        "backends": {"fake": {"block_size": 8}},
        "hub": {"offline": True},
        "plugins": {"blocked": ("nobody",)},
        "logging": {"level": "debug", "format": "json"},
    }
    assert server.loaded is not None
    assert server.loaded.origin("server.port") == "command line"


def test_options_win_over_environment_and_file_and_models_replace_theirs(server: Server) -> None:
    Path("inferflux.yaml").write_text(
        "server: {port: 1}\nmodels: [{source: demo}]\nengine: {itl_target_ms: 9, scheduler: fair}", encoding="utf-8"
    )
    arguments = ("--port", "3", "--port", "4", "--itl-target-ms", "none", "--model", "fake:a", "--model", "fake:b")
    result = inferflux("serve", *arguments, env={"INFERFLUX_SERVER__PORT": "2"})
    assert result.exit_code == 0
    assert server.settings.server.port == 4
    assert server.settings.engine.itl_target_ms is None
    assert server.settings.engine.scheduler == "fair"
    assert [model.source for model in server.settings.models] == ["fake:a", "fake:b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--name", "a"],
            "--name, --alias and --backend belong to a --model; for the models of a file, set them there",
        ),
        (
            ["--model", "a", "--model", "b", "--alias", "c"],
            "--name and --alias need exactly one --model; name several models in a configuration file",
        ),
        (["--set", "server.port"], "Invalid value for --set: 'server.port' is not of the form key.path=value"),
        (["--set", ".port=1"], "Invalid value for --set: '.port=1' is not of the form key.path=value"),
        (
            ["--set", "server.host=[a"],
            "Invalid value for --set: the value of server.host is not valid YAML; put it in quotes if it is text",
        ),
        (["--set", "server.prot=1"], "command line: unknown setting 'server.prot'; did you mean 'server.port'?"),
        (["--set", "models.0.name=a"], "command line: models: must be a list"),
        (["--port", "99999"], "command line: server.port: should be less than or equal to 65535, not 99999"),
        (["--itl-target-ms", "x"], "Invalid value for '--itl-target-ms': 'x' is neither a number nor none"),
        (["--config", "nope.yaml"], "--config: there is no file 'nope.yaml'; correct the path"),
        (
            ["--host", "0.0.0.0"],
            "server.host: '0.0.0.0' can be reached from other machines, and no auth provider is configured; set "
            "auth.providers (such as [api_keys]), listen on 127.0.0.1, or let anyone use the models with --insecure-no-auth "
            "(server.insecure_no_auth: true)",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_starts(server: Server, arguments: list[str], message: str) -> None:
    result = inferflux("serve", *arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {message}"
    assert server.loaded is None


def test_ctrl_c_exits_with_130(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["inferflux_core.serving.server"], "run", interrupted)
    result = inferflux("serve")
    assert (result.exit_code, result.output) == (130, "")


def test_a_failing_plugin_is_one_clean_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[inferflux]\nmain = acme_is_broken\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "inferflux_core.cli.main", "plugins"], capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: plugin 'acme_is_broken' of acme 1.0 cannot be imported: ModuleNotFoundError: No module named "
        "'acme_is_broken'; repair or uninstall acme, or block it with plugins.blocked in the configuration\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {allowed_hosts: ['a b']}", "allowed_hosts"),
        ("server: {tls: {certificate: none.pem, key: none.key}}", "none.pem"),
        ("auth: {providers: [api_keys]}\npolicy: {file: none.csv}", "none.csv"),
        ("auth: {providers: [api_keys]}\npolicy: {file: bad.csv}", "line 1"),
    ],
)
def test_check_looks_at_the_edge_and_the_policy(text: str, message: str) -> None:
    Path("bad.csv").write_text("pp, role:x, *, model/*, generate, deny\n", encoding="utf-8")
    Path("my.yaml").write_text(text, encoding="utf-8")
    result = inferflux("config", "check", "--config", "my.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
