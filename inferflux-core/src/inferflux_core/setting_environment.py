"""Reads settings from `INFERFLUX_*` environment variables: `INFERFLUX_SERVER__PORT=9000` sets server.port.

Names are in capitals, with two underscores between the parts of a key. Lists and whole sections are JSON.

Plain code instead of pydantic-settings' environment source: that one passes over unknown variables, stops at the first
bad value, and does not say which variable a value came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from inferflux_core.setting_keys import (
    VARIABLE_PREFIX,
    accepts_none,
    as_group,
    dotted,
    item_type,
    suggested_variable,
    type_at,
    value_type,
    variable_of,
)
from inferflux_core.setting_layers import Layer

CONFIG_VARIABLE = "INFERFLUX_CONFIG"
"""Names the configuration file; not a setting."""

# Kubernetes and Docker links describe a service named `inferflux` to other containers in variables of this shape.
_LINK_NAME = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def read_environment(environ: Mapping[str, str]) -> tuple[list[Layer], list[str]]:
    """One layer for each variable, those of whole sections first, and what is wrong with the others."""
    layers: list[Layer] = []
    problems: list[str] = []
    for variable in sorted(environ, key=lambda name: (name.count("__"), name)):
        text = environ[variable]
        if not variable.startswith(VARIABLE_PREFIX) or variable == CONFIG_VARIABLE or _is_service_link(variable, text):
            continue
        try:
            layers.append(_layer(variable, text))
        except ValueError as error:
            problems.append(f"environment {variable}: {error}")
    return layers, problems


def _layer(variable: str, text: str) -> Layer:
    path = tuple(variable.removeprefix(VARIABLE_PREFIX).lower().split("__"))
    annotation = type_at(path)
    if annotation is None or variable != variable_of(path):
        for end in range(1, len(path)):
            if item_type(type_at(path[:end])) is not None:
                raise ValueError(f"{dotted(path[:end])} is a list; set it as a whole, as JSON, with {variable_of(path[:end])}")
        raise ValueError(f"unknown setting; {suggested_variable(variable)}")
    values: Any = _value(annotation, text)
    for part in reversed(path):
        values = {part: values}
    return Layer(label=f"environment {variable}", values=values)


def _value(annotation: Any, text: str) -> Any:
    is_list = item_type(annotation) is not None
    is_mapping = as_group(annotation) is not None or value_type(annotation) is not None
    if not is_list and not is_mapping:
        if annotation is Any:  # a plugin's setting, whose type is not known yet
            try:
                return json.loads(text)
            except ValueError:
                return text
        return None if accepts_none(annotation) and text.lower() in ("null", "none") else text
    example = '["one", "two"]' if is_list else '{"key": "value"}'
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(f"must be JSON, such as {example}") from None
    if not isinstance(value, list if is_list else dict) and not (value is None and accepts_none(annotation)):
        raise ValueError(f"must be a JSON {'list' if is_list else 'object'}, such as {example}")
    return value


def _is_service_link(variable: str, text: str) -> bool:
    if "__" in variable:
        return False
    return _LINK_NAME.fullmatch(variable) is not None or (variable.endswith("_PORT") and _LINK_VALUE.match(text) is not None)
