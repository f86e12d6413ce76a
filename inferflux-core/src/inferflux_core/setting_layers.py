"""Settings from several places, put on top of each other key by key, each value remembering where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inferflux_core.setting_keys import SettingPath, accepts_none, as_group, type_at, value_type

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one place.

    Attributes:
        label: where they come from, e.g. `environment INFERFLUX_SERVER__PORT` or `file inferflux.yaml`.
        values: nested mappings, as written.
        lines: line of each key of a file, counted from 1.
        file: name of the file, where `lines` count; None for other places.
    """

    label: str
    values: Mapping[str, Any] = field(repr=False)  # raw, so a secret in it is not masked
    lines: Mapping[SettingPath, int] = field(default_factory=dict)
    file: str | None = None

    def place(self, path: SettingPath) -> str:
        """Where to look for this key, e.g. `inferflux.yaml:12`."""
        if self.file is None:
            return self.label
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file


@dataclass(slots=True)
class Layers:
    """The merged settings. Mappings are merged key by key; everything else, lists too, is replaced as a whole."""

    values: dict[str, Any] = field(default_factory=dict, repr=False)
    _origins: dict[SettingPath, Layer] = field(default_factory=dict)  # of values, lists included
    _sections: dict[SettingPath, Layer] = field(default_factory=dict)  # of mappings: the last layer with such a key

    def put(self, layer: Layer) -> None:
        """Put a layer on top of those already there."""
        self._merge(self.values, layer.values, (), layer)

    def origin(self, path: SettingPath) -> str:
        """Label of the layer that a value came from; of a section, the labels of everything in it."""
        layer = self._value_layer(path)
        if layer is not None:
            return layer.label if self._is_set(path) else DEFAULT
        below = {other.label for at, other in self._origins.items() if at[: len(path)] == path}
        return ", ".join(sorted(below)) or DEFAULT

    def place(self, path: SettingPath) -> str:
        """Where a wrong key or value stands, for an error message."""
        layer = self._value_layer(path)
        for end in range(len(path), 0, -1):
            layer = layer or self._sections.get(path[:end])
        return DEFAULT if layer is None else layer.place(path)

    def _is_set(self, path: SettingPath) -> bool:
        """False for what an item of a list leaves to its default."""
        value: Any = self.values
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def _value_layer(self, path: SettingPath) -> Layer | None:
        for end in range(len(path), 0, -1):
            if path[:end] in self._origins:
                return self._origins[path[:end]]
        return None

    def _merge(self, target: dict[str, Any], values: Mapping[str, Any], parent: SettingPath, layer: Layer) -> None:
        for key, value in values.items():
            path = (*parent, key)
            if value is None and _is_section(path):
                value = {}  # a section whose keys are all commented out
            if isinstance(value, Mapping):
                if not isinstance(target.get(key), dict):
                    self._forget(path)
                    target[key] = {}
                self._sections[path] = layer
                self._merge(target[key], value, path, layer)
            else:
                self._forget(path)
                target[key] = value
                self._origins[path] = layer

    def _forget(self, path: SettingPath) -> None:
        for places in (self._origins, self._sections):
            for other in [other for other in places if other[: len(path)] == path]:
                del places[other]


def _is_section(path: SettingPath) -> bool:
    annotation = type_at(path)
    is_mapping = as_group(annotation) is not None or value_type(annotation) is not None
    return is_mapping and not accepts_none(annotation)
