"""Reads the configuration and checks it: command line, then `INFERFLUX_*` environment, then file, then defaults.

Everything that is wrong is reported at once, one line each, with the place it comes from. `settings.py` says what there
is to set; the `setting_*` modules read it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from inferflux_core.errors import ConfigError, PluginError
from inferflux_core.plugins import PluginRegistry
from inferflux_core.setting_environment import CONFIG_VARIABLE, read_environment
from inferflux_core.setting_file import read_file
from inferflux_core.setting_keys import SettingPath, dotted, is_secret, suggestion, type_at
from inferflux_core.setting_layers import Layer, Layers
from inferflux_core.setting_paths import anchored, is_path
from inferflux_core.settings import ModelSettings, Settings, SpeculativeSettings

DEFAULT_FILE = Path("inferflux.yaml")
"""Read from the current folder if it is there and no other file is named."""

AUTO_BACKEND = "auto"

_DRAFT_MODEL = "draft_model"  # the proposer that needs a second model

# pydantic's words for what it expected, where they speak of Python rather than of a configuration
_EXPECTED = {
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "missing": "is missing and has no default; set it",
    "too_short": "has too few items",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration in effect.

    Attributes:
        settings: validated values.
        file: the configuration file that was read; None if there is none.
    """

    settings: Settings
    file: Path | None
    _layers: Layers = field(repr=False)

    def origin(self, path: str) -> str:
        """Where the value at a path such as `server.port` or `models[0].source` comes from.

        One of `command line`, `environment INFERFLUX_SERVER__PORT`, `file inferflux.yaml` and `default`; for a section,
        those of everything set in it.
        """
        return self._layers.origin(_parsed(path))


def load_settings(
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read, merge and validate the configuration.

    Args:
        config_file: the file to read; by default the one INFERFLUX_CONFIG names, else ./inferflux.yaml if it exists.
        overrides: settings from the command line, as nested mappings.
        environ: environment variables; by default those of this process.

    Raises:
        ConfigError: a file that cannot be read, unknown keys or variables, wrong values; all of them in one message.
    """
    environ = os.environ if environ is None else environ
    file, file_problem = _chosen_file(config_file, environ)
    problems = [file_problem] if file_problem else []
    sources: list[tuple[Layer, Path | None]] = []
    if file is not None and not file_problem:
        layer, found = read_file(file)
        # absolute() and not resolve(): a mounted ConfigMap is a link, and its neighbours lie beside the link.
        sources.append((layer, file.absolute().parent))
        problems += found
    variables, found = read_environment(environ)
    sources += [(layer, None) for layer in variables]
    problems += found
    sources.append((Layer(label="command line", values=overrides or {}), None))

    layers = Layers()
    for layer, folder in sources:
        values = anchored(Settings, layer.values, folder)
        layers.put(Layer(label=layer.label, values=values, lines=layer.lines, file=layer.file))
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(layers.values)
    except ValidationError as error:
        problems += [_problem(details, layers) for details in error.errors(include_url=False) if _is_cause(details)]
    if settings is None or problems:
        raise problems_error(problems)
    return Loaded(settings, file, layers)


def check_plugins(settings: Settings, registry: PluginRegistry) -> None:
    """Check every choice that settings make among plugins, and the settings meant for them.

    Raises:
        ConfigError: a name that nobody registered, settings that a plugin refuses, a model name used twice, several
            default models; all of them in one message.
    """
    if problems := plugin_problems(settings, registry):
        raise problems_error(problems)


def check_bind(settings: Settings) -> None:
    """Refuse to listen where strangers can reach a server that asks nobody who they are.

    Raises:
        ConfigError: the host is not loopback and nothing allows that; says how to allow it.
    """
    if problems := bind_problems(settings):
        raise problems_error(problems)


def problems_error(problems: Iterable[str]) -> ConfigError:
    """One error for several problems: a line each, under a line that counts them."""
    lines = list(problems)
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n".join([f"{len(lines)} problems in the configuration:", *(f"  {line}" for line in lines)]))


def served_name(model: ModelSettings) -> str:
    """The name that clients use: the one set, or else one made from the source.

    `/srv/llama-3-00001-of-00002.gguf` -> `llama-3`, `hf:owner/repo:Q4_K_M@main` -> `owner/repo`;
    anything else stays, such as `demo`.
    """
    if model.name is not None:
        return model.name
    if is_path(model.source):
        path = Path(model.source)
        stem = path.stem if path.suffix.lower() in (".gguf", ".safetensors", ".onnx") else path.name
        return re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    if model.source.startswith("hf:"):
        return re.split(r"[:@]", model.source.removeprefix("hf:"))[0] or model.source
    return model.source


def bind_problems(settings: Settings) -> list[str]:
    """What `check_bind` would refuse."""
    host = settings.server.host
    if settings.server.insecure_no_auth or settings.auth.providers or _is_loopback(host):
        return []
    return [
        f"server.host: {host!r} can be reached from other machines, and no auth provider is configured; set auth.providers "
        f"(such as [api_keys]), listen on 127.0.0.1, or let anyone use the models with --insecure-no-auth "
        f"(server.insecure_no_auth: true)"
    ]


def _access_problems(settings: Settings, registry: PluginRegistry) -> list[str]:
    """Parts of access control that contradict one another: each would leave open what somebody meant to close."""
    auth, limits = settings.auth, settings.limits
    problems: list[str] = []
    for name in auth.providers:
        try:
            registry.settings("auth provider", name, auth.settings.get(name, {}))
        except PluginError as error:
            problems.append(f"auth.providers: {error}")
    for name in auth.settings:
        if name not in auth.providers:
            problems.append(f"auth.settings.{name}: there are settings, but auth.providers has no {name!r}; add it there")
    if len(set(auth.providers)) < len(auth.providers):
        problems.append("auth.providers: a name stands there twice; remove one")
    if auth.providers and settings.server.insecure_no_auth:
        problems.append("server.insecure_no_auth: is on although auth.providers are set; turn one of them off")
    if settings.policy.file is not None and not auth.providers:
        problems.append("policy.file: a policy without auth.providers would never be asked; set auth.providers")
    if limits.store == "redis" and limits.redis_url is None:
        problems.append("limits.redis_url: is missing, and limits.store is 'redis'; set it, e.g. redis://127.0.0.1:6379/0")
    return problems


def plugin_problems(settings: Settings, registry: PluginRegistry) -> list[str]:
    """What `check_plugins` would refuse."""
    problems: list[str] = []

    def check(path: str, kind: str, name: str, values: Mapping[str, Any]) -> bool:
        try:
            registry.settings(kind, name, values)
        except PluginError as error:
            problems.append(f"{path}: {error}")
            return False
        return True

    engine = settings.engine
    check("engine.scheduler", "scheduler", engine.scheduler, engine.scheduler_settings)
    refused = {name for name, values in settings.backends.items() if not check(f"backends.{name}", "backend", name, values)}
    for index, model in enumerate(settings.models):
        path = f"models[{index}].backend"
        if model.backend == AUTO_BACKEND:
            problems += _auto_problems(f"{path}_settings", model, settings, registry)
        elif model.backend not in refused:  # already reported, and the model can only repeat it
            values = {**settings.backends.get(model.backend, {}), **model.backend_settings}
            check(path, "backend", model.backend, values)
    for path, speculative in speculatives(settings):
        if speculative.method is not None:
            check(f"{path}.method", "proposer", speculative.method, speculative.settings)
        if speculative.method == _DRAFT_MODEL and speculative.model is None:
            problems.append(f"{path}.model: the method 'draft_model' needs a draft model; name its source")
        elif speculative.model is not None and speculative.method is None:
            problems.append(f"{path}.method: there is a draft model, but nothing that asks it; set it to 'draft_model'")
        if speculative.backend != AUTO_BACKEND and speculative.backend not in refused:
            values = {**settings.backends.get(speculative.backend, {}), **speculative.backend_settings}
            check(f"{path}.backend", "backend", speculative.backend, values)
    return problems + _access_problems(settings, registry) + _name_problems(settings.models)


def speculatives(settings: Settings) -> Iterator[tuple[str, SpeculativeSettings]]:
    """The settings of speculative decoding, the engine's and the models' own, each with its path."""
    yield "engine.speculative", settings.engine.speculative
    for index, model in enumerate(settings.models):
        if model.speculative is not None:
            yield f"models[{index}].speculative", model.speculative


def _auto_problems(path: str, model: ModelSettings, settings: Settings, registry: PluginRegistry) -> list[str]:
    """Settings for a backend that is chosen later: at least one backend must take them."""
    refusals: list[str] = []
    for name in sorted(registry.entries["backend"]) if model.backend_settings else ():
        try:
            registry.settings("backend", name, {**settings.backends.get(name, {}), **model.backend_settings})
        except PluginError as error:
            refusals.append(str(error))
        else:
            return []
    if not refusals:
        return []
    return [f"{path}: no installed backend takes them ({'; '.join(refusals)}); correct them, or name the backend"]


def _name_problems(models: Iterable[ModelSettings]) -> list[str]:
    problems: list[str] = []
    owners: dict[str, str] = {}
    defaults: list[str] = []
    for index, model in enumerate(models):
        path = f"models[{index}]"
        for name in (served_name(model), *model.aliases):
            if name in owners:
                problems.append(f"{path}: the name {name!r} is already used by {owners[name]}; set another name or alias")
            owners.setdefault(name, path)
        if model.default:
            defaults.append(path)
    if len(defaults) > 1:
        problems.append(f"models: only one model can be the default, not {' and '.join(defaults)}; set default on one")
    return problems


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _chosen_file(config_file: Path | None, environ: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """The file to read, and what is wrong with the choice."""
    if config_file is not None:
        file, chosen_by = config_file, "--config"
    elif variable := environ.get(CONFIG_VARIABLE):
        file, chosen_by = Path(variable).expanduser(), f"environment {CONFIG_VARIABLE}"
    else:
        return (DEFAULT_FILE, None) if DEFAULT_FILE.is_file() else (None, None)
    if not file.exists():
        return file, f"{chosen_by}: there is no file {str(file)!r}; correct the path"
    return file, None


def _is_cause(details: ErrorDetails) -> bool:
    """False for a list that pydantic finds too short only because its items are wrong, which it reports as well."""
    return not (details["type"] == "too_short" and details["input"])


def _problem(details: ErrorDetails, layers: Layers) -> str:
    path: SettingPath = details["loc"]
    place, name = layers.place(path), dotted(path)
    kind = details["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown setting {name!r}; {suggestion(path)}"
    if kind in _EXPECTED:
        return f"{place}: {name}: {_EXPECTED[kind]}"
    message = details["msg"].removeprefix("Input ").partition(", unable to parse")[0]
    value = details["input"]
    shown = isinstance(value, str | int | float) and not is_secret(type_at(path)) and len(str(value)) <= 80
    return f"{place}: {name}: {message}{f', not {value!r}' if shown else ''}"


def _parsed(path: str) -> SettingPath:
    parts = path.replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)
