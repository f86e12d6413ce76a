"""Makes the paths among settings mean the same wherever the server is started from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferflux_core.setting_keys import alternatives, as_group, item_type, value_type
from inferflux_core.settings import ModelSettings, SpeculativeSettings

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: `C:` is a drive
_SOURCES: Mapping[type, str] = {ModelSettings: "source", SpeculativeSettings: "model"}  # where groups name models
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".onnx")


def anchored(annotation: Any, value: Any, folder: Path | None) -> Any:
    """The value with `~` expanded in its paths, and relative paths put below `folder` (None leaves them relative).

    Paths are the settings of type Path, those model sources that are paths, and in the settings of plugins, whose types
    are not known yet, texts that begin with `./`, `../` or `~/`.
    """
    if annotation is Any:
        return _free_form(value, folder)
    values = value_type(annotation)
    if values is not None and isinstance(value, Mapping):
        return {key: anchored(values, item, folder) for key, item in value.items()}
    group = as_group(annotation)
    if group is not None and isinstance(value, Mapping):
        types = {name: field.annotation for name, field in group.model_fields.items()}
        result = {key: anchored(types.get(key), item, folder) for key, item in value.items()}
        name = _SOURCES.get(group)
        source = None if name is None else result.get(name)
        if name is not None and isinstance(source, str) and is_path(source):
            result[name] = _anchored(source, folder)
        return result
    items = item_type(annotation)
    if items is not None and isinstance(value, list):
        return [anchored(items, item, folder) for item in value]
    if isinstance(value, str) and Path in alternatives(annotation):
        return _anchored(value, folder)
    return value


def _free_form(value: Any, folder: Path | None) -> Any:
    if isinstance(value, Mapping):
        return {key: _free_form(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_free_form(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../", "~/")):
        return _anchored(value, folder)
    return value


def is_path(source: str) -> bool:
    """Whether a model source names a file or folder, rather than something like `demo` or `hf:owner/repo`."""
    if _SCHEME.match(source):
        return False
    return "/" in source or source.startswith(("~", ".")) or source.lower().endswith(_MODEL_SUFFIXES)


def _anchored(text: str, folder: Path | None) -> str:
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # a user that this machine does not know: whoever opens the path reports it
        return text
    return str(path if folder is None else folder / path)
