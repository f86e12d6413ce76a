"""The effective configuration as values with their origins, for people and for programs. Secrets are masked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr

from inferflux_core.config import AUTO_BACKEND, Loaded
from inferflux_core.errors import PluginError
from inferflux_core.plugins import PluginRegistry
from inferflux_core.setting_keys import SettingPath, dotted, is_secret, type_at
from inferflux_core.settings import ModelSettings, SpeculativeSettings

MASK = "********"
MAX_COMMENT_COLUMN = 60
"""Comments stand in one column, but no further to the right than this because of a single long value."""


@dataclass(frozen=True, slots=True)
class EffectiveValue:
    """One value in effect, as JSON has it, with secrets masked, and where it came from."""

    path: SettingPath
    value: Any
    origin: str


def effective_values(loaded: Loaded, registry: PluginRegistry) -> list[EffectiveValue]:
    """Every value in the order of declaration; the registry tells which of the plugins' settings are secrets."""
    masked = _PluginSecrets(loaded, registry)
    return [EffectiveValue(path, value, loaded.origin(dotted(path))) for path, value in _walk((), loaded.settings, masked)]


def as_json(loaded: Loaded, values: Sequence[EffectiveValue]) -> str:
    """An object with the file that was read and, for each key, its value and origin."""
    settings = {dotted(item.path): {"value": item.value, "origin": item.origin} for item in values}
    return json.dumps({"file": None if loaded.file is None else str(loaded.file), "settings": settings}, indent=2)


def as_yaml(values: Sequence[EffectiveValue]) -> str:
    """A configuration file with these values and their origins as comments."""
    rows: list[tuple[str, str]] = []
    previous: SettingPath = ()
    for item in values:
        rows += [(text, "") for text in _headings(previous, item.path)]
        rows.append((f"{_lead(previous, item.path)}{_scalar(item.value)}", f"# {item.origin}"))
        previous = item.path
    column = max((len(text) for text, comment in rows if comment and len(text) <= MAX_COMMENT_COLUMN), default=0)
    return "\n".join(f"{text:<{column}}  {comment}".rstrip() for text, comment in rows)


@dataclass(frozen=True, slots=True)
class _PluginSecrets:
    """Which values in the free-form settings of plugins must not be shown."""

    loaded: Loaded
    registry: PluginRegistry

    def __contains__(self, path: SettingPath) -> bool:
        """Whether the value is a secret, or nobody can say that it is none."""
        settings = self.loaded.settings
        match path:
            case ("backends", str(name), *rest):
                return self._is_secret("backend", name, tuple(rest))
            case ("auth", "settings", str(name), *rest):
                return self._is_secret("auth provider", name, tuple(rest))
            case ("engine", "scheduler_settings", *rest):
                return self._is_secret("scheduler", settings.engine.scheduler, tuple(rest))
            case ("models", int(index), "backend_settings", *rest):
                return self._is_backend_secret(settings.models[index].backend, tuple(rest))
            case ("engine", "speculative", *rest):
                return self._is_speculative_secret(settings.engine.speculative, rest)
            case ("models", int(index), "speculative", *rest) if speculative := settings.models[index].speculative:
                return self._is_speculative_secret(speculative, rest)
        return False

    def _is_speculative_secret(self, speculative: SpeculativeSettings, path: Sequence[str | int]) -> bool:
        match path:
            case ("settings", *rest):
                return speculative.method is None or self._is_secret("proposer", speculative.method, tuple(rest))
            case ("backend_settings", *rest):
                return self._is_backend_secret(speculative.backend, tuple(rest))
        return False

    def _is_backend_secret(self, backend: str, path: SettingPath) -> bool:
        if backend != AUTO_BACKEND:
            return self._is_secret("backend", backend, path)
        known = [found for name in self.registry.entries["backend"] if (found := self._type(name, path))]
        return not known or any(map(is_secret, known))

    def _is_secret(self, kind: str, name: str, path: SettingPath) -> bool:
        try:
            model = self.registry.get(kind, name).registration.settings
        except PluginError:
            return True
        annotation = type_at(path, model)
        return annotation is None or is_secret(annotation)

    def _type(self, backend: str, path: SettingPath) -> Any:
        return type_at(path, self.registry.get("backend", backend).registration.settings)


def _walk(path: SettingPath, value: Any, secrets: _PluginSecrets) -> Iterator[tuple[SettingPath, Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _walk((*path, name), getattr(value, name), secrets)
    elif isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _walk((*path, name), item, secrets)
    elif isinstance(value, tuple) and any(isinstance(item, ModelSettings) for item in value):
        for index, item in enumerate(value):
            yield from _walk((*path, index), item, secrets)
    else:
        yield path, _plain(path, value, secrets)


def _plain(path: SettingPath, value: Any, secrets: _PluginSecrets) -> Any:
    """The value as JSON has it, secrets masked at any depth."""
    if isinstance(value, tuple | list):
        return [_plain((*path, index), item, secrets) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: _plain((*path, key), item, secrets) for key, item in value.items()}
    if isinstance(value, SecretStr) or (value is not None and path in secrets):
        return MASK
    return str(value) if isinstance(value, Path) else value


def _headings(previous: SettingPath, path: SettingPath) -> Iterator[str]:
    """The lines of the sections that begin between two values."""
    for depth, part in enumerate(path[:-1]):
        if isinstance(part, str) and path[: depth + 1] != previous[: depth + 1]:
            yield f"{_lead(previous, path[: depth + 1])}".rstrip()


def _lead(previous: SettingPath, path: SettingPath) -> str:
    """Indentation and key of a value; the first one of a list item carries the dash."""
    indent = "  " * (len(path) - 1)
    begins_item = len(path) > 1 and isinstance(path[-2], int) and previous[: len(path) - 1] != path[:-1]
    if begins_item:
        indent = indent[:-2] + "- "
    return f"{indent}{_scalar(path[-1])}: "


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")
